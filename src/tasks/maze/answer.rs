//! How the answer of a completion is read: strictly. What a model thinks is its own affair, what it answers is not.

use crate::tasks::maze::format::{BEGIN, END, END_THINK, PAD, RESET, RESET_LINE, THINK};
use crate::tasks::maze::grid::Direction;

/// How completions are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// `<think>`, a trace, `</think>` and move tokens, nothing between them.
    Strict,
    /// The same with white space anywhere; the thoughts may be left out.
    Lines,
    /// The same, the moves being words.
    Words,
}

/// What an answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The completion has the format's form, from `<think>` to the last move.
    pub well_formed: bool,
    /// The moves of the answer up to the first thing that is no move.
    pub moves: Vec<Direction>,
    /// The thoughts give an attempt up and begin anew.
    pub retried: bool,
}

/// Reads the answer of a completion.
pub(super) fn read_answer(form: Form, completion: &str) -> Answer {
    if form == Form::Strict { read_strict(completion) } else { read_lines(form, completion) }
}

fn read_strict(completion: &str) -> Answer {
    let mut well_formed = true;
    let mut pieces = Pieces(completion);
    well_formed &= pieces.next() == Some(THINK);
    let (mut closed, mut retried) = (false, false);
    for piece in pieces.by_ref() {
        if piece == END_THINK {
            closed = true;
            break;
        }
        retried |= piece == RESET;
        well_formed &= ![THINK, PAD, BEGIN, END].contains(&piece);
    }
    let mut moves = Vec::new();
    let mut clean = true;
    for piece in pieces {
        match direction(piece) {
            Some(direction) if clean => moves.push(direction),
            _ => clean = false,
        }
    }
    Answer { well_formed: well_formed && closed && clean && !moves.is_empty(), moves, retried }
}

fn read_lines(form: Form, completion: &str) -> Answer {
    // A chat template may have written `<think>` already; the rest of the thoughts must be whole.
    let begun = completion.trim_start().strip_prefix(THINK);
    let (thoughts, answer, closed) = match begun.unwrap_or(completion).split_once(END_THINK) {
        Some((thoughts, answer)) => (thoughts, answer, true),
        None if begun.is_some() => (begun.unwrap_or_default(), "", false),
        None => ("", completion, true),
    };
    let specials = [THINK, PAD, BEGIN, END];
    let mut well_formed = closed && !specials.iter().any(|special| thoughts.contains(special));
    let retried = thoughts.lines().any(|line| line.trim() == RESET_LINE);
    let mut moves = Vec::new();
    let mut clean = true;
    let mut take = |said: Option<Direction>| match said {
        Some(direction) if clean => moves.push(direction),
        _ => clean = false,
    };
    if form == Form::Words {
        answer.split_whitespace().for_each(|word| take(named(word)));
    } else {
        Pieces(answer).filter(|piece| !piece.trim().is_empty()).for_each(|piece| take(direction(piece)));
    }
    well_formed &= clean && !moves.is_empty();
    Answer { well_formed, moves, retried }
}

/// Cuts a text into tokens (`<think>`, `</think>`, `<|...|>`) and whatever stands between them.
pub(super) struct Pieces<'a>(pub(super) &'a str);

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        if self.0.is_empty() {
            return None;
        }
        let length = token_length(self.0).unwrap_or_else(|| {
            let starts = self.0.char_indices().skip(1).filter(|(_, character)| *character == '<');
            let mut tokens = starts.filter(|(at, _)| token_length(&self.0[*at..]).is_some());
            tokens.next().map_or(self.0.len(), |(at, _)| at)
        });
        let (piece, rest) = self.0.split_at(length);
        self.0 = rest;
        Some(piece)
    }
}

/// The bytes of the token that `text` begins with.
pub(super) fn token_length(text: &str) -> Option<usize> {
    if let Some(token) = [THINK, END_THINK].into_iter().find(|token| text.starts_with(token)) {
        return Some(token.len());
    }
    let inner = text.strip_prefix("<|")?;
    let end = inner.find(['<', '>'])?;
    (inner[end..].starts_with('>') && inner[..end].ends_with('|')).then_some(2 + end + 1)
}

/// The move that a token is.
fn direction(piece: &str) -> Option<Direction> {
    named(piece.strip_prefix("<|")?.strip_suffix("|>")?)
}

/// The move of a name.
pub(super) fn named(name: &str) -> Option<Direction> {
    Direction::ALL.into_iter().find(|direction| direction.name() == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_to_the_text_they_were_cut_from() {
        for text in ["", "x", "<", "<|", "<|a", "<|a|", "<|a|>", "a<|b|>c<think></think>é<|<|d|>>", "<|a>|>", "<think"]
        {
            assert_eq!(Pieces(text).collect::<String>(), text);
        }
        assert_eq!(
            Pieces("a<|b|>ü<think><|c<|d|>").collect::<Vec<_>>(),
            ["a", "<|b|>", "ü", "<think>", "<|c", "<|d|>"]
        );
    }

    #[test]
    fn lines_may_have_white_space_and_no_thoughts_and_nothing_else() {
        let letters = |form, text: &str| {
            let answer = read_answer(form, text);
            let moves: String = answer.moves.iter().map(|direction| &direction.name()[..1]).collect();
            (answer.well_formed, moves, answer.retried)
        };
        let good = [
            "<think>\nx\n</think>\n\n<|up|><|left|>",
            "<think></think><|up|> <|left|>\n",
            "<|up|><|left|>",
            " <|up|>\n<|left|>",
            "x\n</think>\n<|up|><|left|>",
        ];
        for text in good {
            assert_eq!(letters(Form::Lines, text), (true, "ul".to_owned(), false), "{text}");
            let words = text.replace("<|", " ").replace("|>", " ");
            assert_eq!(letters(Form::Words, &words), (true, "ul".to_owned(), false), "{words}");
        }
        for text in [
            "<think>\n<|up|>",
            "<think></think>",
            "",
            "<think></think>go <|up|>",
            "<think></think></think><|up|>",
            "<think><think></think><|up|>",
            "<think></think><|up|><|target|>",
            "<think></think><|up|><|eos|>",
        ] {
            assert!(!letters(Form::Lines, text).0, "{text}");
        }
        assert!(!letters(Form::Words, "<think></think>up, left").0);
        assert!(!letters(Form::Words, "Up left").0);
        assert!(letters(Form::Lines, "<think>\nStep 1\nRESET\nStep 1\n</think><|up|>").2);
        assert!(!letters(Form::Lines, "<think>\nno RESET here\n</think><|up|>").2);
        assert!(letters(Form::Strict, "<think><|0-0|><|reset|><|0-0|></think><|up|>").2);
    }
}
