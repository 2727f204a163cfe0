//! Plain text as words, digits and signs, for tokenizers that are made of a task alone.

/// Text as words and single digits, each with the space before it, else as characters.
pub(super) fn cut(text: &str) -> Vec<&str> {
    let (mut pieces, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(first_length(rest));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// The bytes of the first piece of a text that is not empty.
pub(super) fn first_length(text: &str) -> usize {
    let first = text.chars().next().map_or(0, char::len_utf8);
    let space = usize::from(text.starts_with(' '));
    let body = &text[space..];
    let letters = body.bytes().take_while(u8::is_ascii_alphabetic).count();
    match body.bytes().next() {
        Some(byte) if byte.is_ascii_digit() => space + 1,
        _ if letters > 0 => space + letters,
        _ => first,
    }
}

/// The regular expression by which a text falls into the same pieces, the tokens `<|...|>` and the ends of thinking whole.
pub(super) const PIECES: &str = r"<\|[^<>]*\|>|</?think>| ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9]";

/// Every digit as [`cut`] leaves it.
pub(super) fn digits() -> impl Iterator<Item = String> {
    (0..10).flat_map(|digit| [format!("{digit}"), format!(" {digit}")])
}
