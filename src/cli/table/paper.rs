//! Tables for READMEs and papers: an arm a row, a metric a column; of one arm with many metrics, a metric a row.

use std::fmt::Write as _;

use crate::cli::comparison::{Comparison, Tested, difference_name};
use crate::cli::render;
use crate::cli::table::text;
use crate::statistics::Estimate;

/// A table before it is written: its first column holds names.
pub(in crate::cli) struct Wide {
    /// What it shows; empty for the table of metrics.
    pub(in crate::cli) title: String,
    /// As many as a row has.
    pub(in crate::cli) header: Vec<String>,
    /// An arm each, or a metric.
    pub(in crate::cli) rows: Vec<Vec<String>>,
}

/// More columns than a page is wide.
const MANY: usize = 4;

impl Wide {
    /// A single row of many columns as rows of two: its name heads the second.
    fn upright(self) -> Self {
        let [row] = self.rows.as_slice() else { return self };
        if row.len() <= MANY {
            return self;
        }
        let header = vec!["metric".to_owned(), row[0].clone()];
        let pairs = self.header.iter().zip(row).skip(1);
        let rows = pairs.map(|(head, cell)| vec![head.clone(), cell.clone()]).collect();
        Self { title: self.title, header, rows }
    }
}

/// `72.0 % [70.0, 74.0]`.
fn cell(found: Option<Estimate>, share: bool) -> String {
    let Some(found) = found else { return "-".to_owned() };
    let interval = text::interval(found.low, found.high, share, false);
    [text::mean(&found, share), interval].join(" ").trim_end().to_owned()
}

/// `+6.1 pp [+4.0, +8.2], p < 0.001`, where p is Holm's.
fn tested_cell(tested: Option<Tested>, share: bool) -> String {
    let Some(Tested { difference, p_holm }) = tested else { return "-".to_owned() };
    let interval = text::interval(difference.low, difference.high, share, true);
    let mut cell = [text::change(difference.mean, share), interval].join(" ").trim_end().to_owned();
    if let Some(p) = p_holm {
        let p = render::p_value(p);
        let _ = write!(cell, ", p {}", if p.starts_with('<') { p } else { format!("= {p}") });
    }
    cell
}

/// The tables: metrics, differences within arms, differences from the baseline.
pub(in crate::cli) fn tables(comparison: &Comparison) -> Vec<Wide> {
    let is_share = |name: &str| comparison.shares.contains(name);
    let named = |arm: &str| if arm.is_empty() { "all runs".to_owned() } else { arm.to_owned() };
    let header = |columns: &mut dyn Iterator<Item = String>| {
        std::iter::once("arm".to_owned()).chain(columns).collect::<Vec<_>>()
    };
    let mut tables = Vec::new();
    // Where every cell of a column rests on as many units, its head says so.
    let units = |metric: &String| {
        let mut all = comparison.arms.iter().filter_map(|arm| arm.metrics.get(metric)?.map(|found| found.n));
        let first = all.next()?;
        all.all(|n| n == first).then_some(first)
    };
    let heads = comparison.metrics.iter().map(|metric| match units(metric) {
        Some(n) => format!("{metric} (n = {})", render::count(n as u64)),
        None => metric.clone(),
    });
    let rows = comparison.arms.iter().map(|arm| {
        let cells = comparison.metrics.iter().map(|metric| {
            let found = arm.metrics.get(metric).copied().flatten();
            let n = found
                .filter(|_| units(metric).is_none())
                .map(|found| format!(" (n = {})", render::count(found.n as u64)));
            format!("{}{}", cell(found, is_share(metric)), n.unwrap_or_default())
        });
        std::iter::once(named(&arm.arm)).chain(cells).collect()
    });
    tables.push(Wide { title: String::new(), header: header(&mut heads.into_iter()), rows: rows.collect() });
    if !comparison.differences.is_empty() {
        let names = || comparison.differences.iter().map(|(first, second)| difference_name(first, second));
        let rows = comparison.arms.iter().map(|arm| {
            let cells = comparison.differences.iter().map(|(first, second)| {
                let found = arm.differences.get(&difference_name(first, second)).copied().flatten();
                tested_cell(found, is_share(first) && is_share(second))
            });
            std::iter::once(named(&arm.arm)).chain(cells).collect()
        });
        let title = "Differences within an arm".to_owned();
        tables.push(Wide { title, header: header(&mut names()), rows: rows.collect() });
    }
    if let Some(baseline) = &comparison.baseline {
        let rows: Vec<Vec<String>> = comparison
            .arms
            .iter()
            .filter_map(|arm| {
                let versus = arm.versus_baseline.as_ref()?;
                let cell = |metric: &String| tested_cell(versus.get(metric).copied().flatten(), is_share(metric));
                Some(std::iter::once(named(&arm.arm)).chain(comparison.metrics.iter().map(cell)).collect())
            })
            .collect();
        if !rows.is_empty() {
            let title = format!("Minus the baseline {baseline}");
            tables.push(Wide { title, header: header(&mut comparison.metrics.iter().cloned()), rows });
        }
    }
    tables.into_iter().map(Wide::upright).collect()
}

/// Tables with pipes, and what they claim below.
pub(super) fn markdown(comparison: &Comparison, question: &str) -> String {
    let escaped = |cell: &str| cell.replace('|', "\\|").replace('*', "\\*").replace('_', "\\_");
    let mut text = format!("### {}\n\n", escaped(&comparison.experiment));
    if let Some(question) = question.lines().next().filter(|line| !line.is_empty()) {
        let _ = write!(text, "{question}\n\n");
    }
    for Wide { title, header, rows } in tables(comparison) {
        if !title.is_empty() {
            let _ = write!(text, "{}\n\n", escaped(&title));
        }
        let mut line = |cells: &mut dyn Iterator<Item = String>| {
            let _ = writeln!(text, "| {} |", cells.collect::<Vec<_>>().join(" | "));
        };
        line(&mut header.iter().map(|cell| escaped(cell)));
        line(&mut header.iter().enumerate().map(|(place, _)| if place == 0 { "---".into() } else { "---:".into() }));
        for row in rows {
            line(&mut row.iter().map(|cell| escaped(cell)));
        }
        text.push('\n');
    }
    let _ = writeln!(text, "{}", escaped(&text::meaning(comparison, true)));
    text
}

/// `tabular`s with the rules of `booktabs`, and what they claim as the caption.
pub(super) fn latex(comparison: &Comparison, question: &str) -> String {
    let mut text = String::from("% \\usepackage{booktabs}\n\\begin{table}\n  \\centering\n");
    for Wide { title, header, rows } in tables(comparison) {
        if !title.is_empty() {
            let _ = writeln!(text, "  \\par\\medskip\n  {}\\\\[2pt]", tex(&title));
        }
        let _ = writeln!(text, "  \\begin{{tabular}}{{l{}}}\n    \\toprule", "r".repeat(header.len() - 1));
        let line = |cells: &[String]| cells.iter().map(|cell| tex(cell)).collect::<Vec<_>>().join(" & ");
        let _ = writeln!(text, "    {} \\\\\n    \\midrule", line(&header));
        for row in rows {
            let _ = writeln!(text, "    {} \\\\", line(&row));
        }
        let _ = writeln!(text, "    \\bottomrule\n  \\end{{tabular}}");
    }
    let question = question.lines().next().filter(|line| !line.is_empty()).map(|line| format!("{} ", tex(line)));
    let caption = tex(&text::meaning(comparison, true).replace('\n', " "));
    let label = tex_label(&comparison.experiment);
    let _ = writeln!(
        text,
        "  \\caption{{{}{caption}}}\n  \\label{{tab:{label}}}\n\\end{{table}}",
        question.unwrap_or_default()
    );
    text
}

/// Text with what TeX would read as its own escaped. A minus before a digit is one.
fn tex(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    let mut before = ' ';
    while let Some(character) = characters.next() {
        match character {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => out.extend(['\\', character]),
            '\\' => out.push_str("\\textbackslash{}"),
            '~' => out.push_str("\\textasciitilde{}"),
            '^' => out.push_str("\\textasciicircum{}"),
            '<' | '>' => out.extend(['$', character, '$']),
            '-' if matches!(before, ' ' | '[') && characters.peek().is_some_and(char::is_ascii_digit) => {
                out.push_str("$-$");
            }
            other => out.push(other),
        }
        before = character;
    }
    out
}

/// A name that `\ref` takes.
fn tex_label(name: &str) -> String {
    name.chars().map(|character| if character.is_ascii_alphanumeric() { character } else { '-' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::table::tests::comparison;

    #[test]
    fn markdown_has_an_arm_a_row() {
        insta::assert_snapshot!(markdown(&comparison(), "Which part of the reward does the work?"), @r"
        ### maze

        Which part of the reward does the work?

        | arm | sft.solved (n = 1,000) | grpo.solved |
        | --- | ---: | ---: |
        | drop=none | 72.0 % [70.0, 74.0] | - |
        | drop=progress | 72.0 % [70.0, 74.0] | - |

        Differences within an arm

        | arm | grpo.solved - sft.solved |
        | --- | ---: |
        | drop=none | +6.1 pp [+4.0, +8.2], p < 0.001 |
        | drop=progress | +6.1 pp [+4.0, +8.2], p < 0.001 |

        Minus the baseline drop=none

        | arm | sft.solved | grpo.solved |
        | --- | ---: | ---: |
        | drop=progress | -1.0 pp [+4.0, +8.2], p = 0.300 | - |

        Claim A, about these checkpoints: n counts instances; intervals are Wilson's for shares, Student's t otherwise.
        A claim about the recipe needs at least 5 seeds.
        Differences are paired by instance and seed: Student's t interval, p from sign flips within instances.
        Every p is after Holm's correction over the tests of a block.
        ");
    }

    #[test]
    fn one_row_of_many_columns_stands_upright() {
        let words = |words: &str| words.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let wide = |row: &str| Wide { title: String::new(), header: words("arm a b c d"), rows: vec![words(row)] };
        let upright = wide("all 1 2 3 4").upright();
        assert_eq!(upright.header, ["metric", "all"]);
        assert_eq!(upright.rows, [["a", "1"], ["b", "2"], ["c", "3"], ["d", "4"]]);
        let two = Wide { rows: vec![words("x 1 2 3 4"), words("y 1 2 3 4")], ..wide("") };
        assert_eq!(two.upright().rows.len(), 2);
        let narrow = Wide { title: String::new(), header: words("arm a"), rows: vec![words("all 1")] };
        assert_eq!(narrow.upright().header, ["arm", "a"]);
    }

    #[test]
    fn latex_has_booktabs_and_a_caption() {
        insta::assert_snapshot!(latex(&comparison(), "Which 50 % of it?"), @r"
        % \usepackage{booktabs}
        \begin{table}
          \centering
          \begin{tabular}{lrr}
            \toprule
            arm & sft.solved (n = 1,000) & grpo.solved \\
            \midrule
            drop=none & 72.0 \% [70.0, 74.0] & - \\
            drop=progress & 72.0 \% [70.0, 74.0] & - \\
            \bottomrule
          \end{tabular}
          \par\medskip
          Differences within an arm\\[2pt]
          \begin{tabular}{lr}
            \toprule
            arm & grpo.solved - sft.solved \\
            \midrule
            drop=none & +6.1 pp [+4.0, +8.2], p $<$ 0.001 \\
            drop=progress & +6.1 pp [+4.0, +8.2], p $<$ 0.001 \\
            \bottomrule
          \end{tabular}
          \par\medskip
          Minus the baseline drop=none\\[2pt]
          \begin{tabular}{lrr}
            \toprule
            arm & sft.solved & grpo.solved \\
            \midrule
            drop=progress & $-$1.0 pp [+4.0, +8.2], p = 0.300 & - \\
            \bottomrule
          \end{tabular}
          \caption{Which 50 \% of it? Claim A, about these checkpoints: n counts instances; intervals are Wilson's for shares, Student's t otherwise. A claim about the recipe needs at least 5 seeds. Differences are paired by instance and seed: Student's t interval, p from sign flips within instances. Every p is after Holm's correction over the tests of a block.}
          \label{tab:maze}
        \end{table}
        ");
    }

    #[test]
    fn what_tex_reads_as_its_own_is_escaped() {
        assert_eq!(tex("a_b & 5 % < -3 [-2, x-1]"), "a\\_b \\& 5 \\% $<$ $-$3 [$-$2, x-1]");
    }
}
