//! The page: everything it needs is in it, and nothing in it is asked for elsewhere.

use std::fmt::Write as _;

use crate::cli::table::Wide;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// Text as HTML shows it, also in an attribute.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A whole page under `title`.
pub(super) fn page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <link rel=\"icon\" href=\"data:,\">\n<title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n\
         <script>\n{SCRIPT}</script>\n</body>\n</html>\n",
        escaped(title)
    )
}

/// A table whose first column holds names; what stands in brackets is less loud. `baseline` is the name of a row that is marked.
pub(super) fn table(wide: &Wide, baseline: Option<&str>) -> String {
    let mut text = String::new();
    if !wide.title.is_empty() {
        let _ = writeln!(text, "<h3>{}</h3>", escaped(&wide.title));
    }
    text.push_str("<div class=\"scroll\"><table>\n<thead><tr>");
    for cell in &wide.header {
        // A narrow page breaks names where they are put together.
        let _ = write!(text, "<th>{}</th>", escaped(cell).replace('.', ".<wbr>").replace('_', "_<wbr>"));
    }
    text.push_str("</tr></thead>\n<tbody>\n");
    for row in &wide.rows {
        let marked = baseline.is_some_and(|name| row.first().is_some_and(|first| first == name));
        text.push_str(if marked { "<tr class=\"baseline\">" } else { "<tr>" });
        for cell in row {
            match cell.split_once('[') {
                Some((mean, interval)) => {
                    let (mean, interval) = (escaped(mean), escaped(interval));
                    let _ = write!(text, "<td>{mean}<span class=\"interval\">[{interval}</span></td>");
                }
                None => {
                    let _ = write!(text, "<td>{}</td>", escaped(cell));
                }
            }
        }
        text.push_str("</tr>\n");
    }
    text.push_str("</tbody></table></div>\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_asks_for_nothing_elsewhere() {
        let wide = Wide {
            title: "<t>".to_owned(),
            header: vec!["arm".to_owned(), "solved".to_owned()],
            rows: vec![vec!["a".to_owned(), "72.0 % [70.0, 74.0]".to_owned()]],
        };
        let page = page("a & b", &table(&wide, Some("a")));
        for word in ["http://", "https://", "src=", "@import", "url("] {
            assert!(!page.contains(word), "{word}");
        }
        assert!(page.contains("<title>a &amp; b</title>") && page.contains("&lt;t&gt;"), "{page}");
        assert!(
            page.contains("<tr class=\"baseline\"><td>a</td><td>72.0 % <span class=\"interval\">[70.0, 74.0]</span>")
        );
    }
}
