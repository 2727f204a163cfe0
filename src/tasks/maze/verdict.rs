//! What is measured of a walk, and what is further to be said of it.

use crate::tasks::maze::answer::{Answer, Form, named};
use crate::tasks::maze::format::END_THINK;
use crate::tasks::maze::grid::{Direction, Maze};
use crate::tasks::{Finish, Measure, Measurements};

/// What a verdict measures.
pub static MEASURES: &[Measure] = &[
    Measure::new(
        "solved",
        "1 where a well-formed, finished answer walks through no wall, reaches the target with its last move \
                  and not before; else 0",
    ),
    Measure::new("valid_moves", "moves of the answer before the first that runs into a wall"),
    Measure::new("steps", "moves of the answer up to the first thing that is no move"),
    Measure::new("shortest", "moves of the shortest path"),
    Measure::new("wall_hits", "moves of the answer that run into a wall, the walker staying where it is"),
    Measure::new("progress", "the share of the distance to the target that the valid moves have covered, from 0 to 1"),
    Measure::new(
        "format",
        "1 where the completion is `<think>`, a trace, `</think>` and at least one move and nothing but \
                  moves; else 0",
    ),
    Measure::new("finished", "1 where the model ended its completion, 0 where the token limit did"),
];

/// What a diagnosis tells. Of `solved` and the names that begin with `error_` exactly one is 1.
pub static DIAGNOSES: &[Measure] = &[
    Measure::new("error_out_of_tokens", "1 where the token limit ended the completion"),
    Measure::new("error_no_answer", "1 where it ended and holds no move where the answer should be"),
    Measure::new("error_malformed", "1 where there are moves, but the completion has not the format's form"),
    Measure::new("error_wall", "1 where a well-formed answer runs into a wall before it comes to the target"),
    Measure::new("error_overshoot", "1 where a well-formed answer comes to the target and goes on"),
    Measure::new("error_stopped_short", "1 where a well-formed answer walks through no wall and never to the target"),
    Measure::new("first_attempt", "1 where `solved` is and no attempt was given up on the way; else 0"),
    Measure::new("optimal", "1 where `solved` is by a shortest path; else 0"),
    Measure::new(
        "harness",
        "1 where the evaluation of AlphaMaze's code would count it: the moves between the first `</think>` and a \
                  second one, whatever stands between them, walk through no wall and end on the target; else 0",
    ),
];

/// A walk as an answer takes it.
struct Walk {
    /// The cell where it ends, walls standing still.
    end: usize,
    valid_moves: usize,
    /// The cell reached by the valid moves.
    last_valid: usize,
    wall_hits: usize,
    /// It went on from the target.
    overshoot: bool,
    /// It went on from the target before it first ran into a wall.
    overshoot_first: bool,
}

impl Walk {
    fn new(maze: &Maze, moves: &[Direction]) -> Self {
        let origin = maze.origin;
        let mut walk = Self {
            end: origin,
            valid_moves: 0,
            last_valid: origin,
            wall_hits: 0,
            overshoot: false,
            overshoot_first: false,
        };
        for &direction in moves {
            walk.overshoot |= walk.end == maze.target;
            walk.overshoot_first |= walk.end == maze.target && walk.wall_hits == 0;
            match maze.step(walk.end, direction) {
                Some(next) => walk.end = next,
                None => walk.wall_hits += 1,
            }
            if walk.wall_hits == 0 {
                walk.valid_moves += 1;
                walk.last_valid = walk.end;
            }
        }
        walk
    }

    fn is_right(&self, maze: &Maze) -> bool {
        self.wall_hits == 0 && !self.overshoot && self.end == maze.target
    }
}

fn number(flag: bool) -> f64 {
    f64::from(u8::from(flag))
}

fn named_values<const COUNT: usize>(measures: &[Measure], values: [f64; COUNT]) -> Measurements {
    measures.iter().map(|measure| measure.name.clone().into_owned()).zip(values).collect()
}

/// The verdict on an answer.
pub(super) fn measure(maze: &Maze, answer: &Answer, finish: Finish) -> Measurements {
    let walk = Walk::new(maze, &answer.moves);
    let distances = maze.distances();
    let left = |cell: usize| distances[cell].map_or(f64::INFINITY, |moves| moves as f64);
    let finished = finish == Finish::Stop;
    let start = left(maze.origin);
    let values = [
        number(finished && answer.well_formed && walk.is_right(maze)),
        walk.valid_moves as f64,
        answer.moves.len() as f64,
        maze.length as f64,
        walk.wall_hits as f64,
        ((start - left(walk.last_valid)) / start).clamp(0.0, 1.0),
        number(answer.well_formed),
        number(finished),
    ];
    named_values(MEASURES, values)
}

/// The diagnosis of a completion, which holds `answer`.
pub(super) fn diagnose(maze: &Maze, form: Form, answer: &Answer, completion: &str, finish: Finish) -> Measurements {
    let walk = Walk::new(maze, &answer.moves);
    // The first that holds is the error.
    let found = [
        finish == Finish::Length,
        answer.moves.is_empty(),
        !answer.well_formed,
        walk.wall_hits > 0 && !walk.overshoot_first,
        walk.overshoot,
        walk.end != maze.target,
    ];
    let error = found.iter().position(|holds| *holds);
    let is = |place: usize| number(error == Some(place));
    let solved = error.is_none();
    let values = [
        is(0),
        is(1),
        is(2),
        is(3),
        is(4),
        is(5),
        number(solved && !answer.retried),
        number(solved && answer.moves.len() == maze.length),
        number(harness(maze, form, completion)),
    ];
    named_values(DIAGNOSES, values)
}

/// Whether the evaluation of AlphaMaze's code would count a completion (`benchmark/evaluator.py` of
/// menloresearch/visual-thinker): every `<|x|>` of the answer is taken, also without its last `>`; what is no move does
/// nothing; a move into a wall fails, the last cell must be the target. Of words every one is taken.
fn harness(maze: &Maze, form: Form, completion: &str) -> bool {
    let Some((_, rest)) = completion.split_once(END_THINK) else { return false };
    let answer = rest.split(END_THINK).next().unwrap_or_default();
    let moves: Vec<Direction> = if form == Form::Words {
        answer.split(|letter: char| !letter.is_alphanumeric()).filter_map(named).collect()
    } else {
        pulled(answer).filter_map(named).collect()
    };
    let end = moves.iter().try_fold(maze.origin, |cell, &direction| maze.step(cell, direction));
    end == Some(maze.target)
}

/// What the regular expression `<\|(.*?)\|>?` finds in a text, from left to right: it takes the first `|` behind a `<|`,
/// whatever stands before it, and comes over no end of line.
fn pulled(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        loop {
            let (_, inner) = rest.split_once("<|")?;
            rest = inner;
            let end = inner.find(['|', '\n'])?;
            if inner[end..].starts_with('|') {
                rest = &inner[end + 1..];
                return Some(&inner[..end]);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::pulled;

    #[test]
    fn names_are_pulled_out_as_the_regular_expression_does() {
        // Each what Python's `re.findall(r"<\|(.*?)\|>?", text)` gives.
        let cases: [(&str, &[&str]); 9] = [
            ("<|up|><|down|>", &["up", "down"]),
            ("x<|up|y <|left|", &["up", "left"]),
            ("<|a<|up|>", &["a<"]),
            ("<|a <|up|><|left|>", &["a <", "left"]),
            ("<|up\n|><|left|>", &["left"]),
            ("<|up\n<|left|>", &["left"]),
            ("<||><|up", &[""]),
            ("<|<|up|>", &["<"]),
            ("|>up|>", &[]),
        ];
        for (text, names) in cases {
            assert_eq!(pulled(text).collect::<Vec<_>>(), names, "{text:?}");
        }
    }
}
