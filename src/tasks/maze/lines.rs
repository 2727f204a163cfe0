//! What stands in words around a maze: the legend, the steps in which the maze is printed again, the messages between
//! attempts, and the maze in plain characters.
//!
//! The layout is AlphaMaze's (menloresearch/visual-thinker): a row of cells a line; a step is the line `Step 1: Go up` and
//! the whole maze, in which the cell that is left shows the move; an attempt that fails ends with a message and the line
//! `RESET`, and counting begins anew. The wording of the prompt is our own.

use std::fmt::Write as _;
use std::ops::Range;

use crate::tasks::maze::answer::token_length;
use crate::tasks::maze::attempt::Attempt;
use crate::tasks::maze::format::{
    END_THINK, Format, RESET_LINE, THINK, Thought, coordinate, marker, move_token, wall_token,
};
use crate::tasks::maze::grid::{CLOSED, Direction, Maze};
use crate::tasks::words::{digits, first_length};
use crate::tasks::{Demonstrated, MazePrompt, Signs};

/// The line before the maze.
pub(super) const MAZE_LINE: &str = "MAZE:";
/// How markers and moves are written in plain characters, by their names.
const LETTERS: [(&str, &str); 7] =
    [("origin", "O"), ("target", "T"), ("blank", "."), ("up", "^"), ("down", "v"), ("left", "<"), ("right", ">")];

impl Format {
    /// The prompt: the legend where there is one, and the maze row by row.
    pub(super) fn lines_prompt(&self, maze: &Maze) -> String {
        let legend = match self.prompt {
            MazePrompt::Legend => self.legend(maze.rows, maze.columns),
            MazePrompt::Maze => String::new(),
        };
        legend + &self.board(maze, None) + "\n"
    }

    /// The maze row by row; `leaving` is the cell where the walker stands and the way by which it leaves.
    fn board(&self, maze: &Maze, leaving: Option<(usize, Direction)>) -> String {
        let sign = |cell: usize| match leaving {
            Some((left, direction)) if left == cell => direction.name(),
            _ => marker(maze, cell),
        };
        let join = self.separator();
        let row = |row: usize| {
            let cells = row * maze.columns..(row + 1) * maze.columns;
            cells.map(|cell| self.cell(maze, cell, sign(cell))).collect::<Vec<_>>().join(join)
        };
        (0..maze.rows).map(row).collect::<Vec<_>>().join("\n")
    }

    /// What stands between two cells and between two moves.
    fn separator(&self) -> &'static str {
        match self.signs {
            Signs::Tokens => "",
            Signs::Text => " ",
        }
    }

    fn place(&self, cell: usize, columns: usize) -> String {
        match self.signs {
            Signs::Tokens => coordinate(cell, columns),
            Signs::Text => format!("{}-{}", cell / columns, cell % columns),
        }
    }

    fn move_word(&self, direction: Direction) -> String {
        match self.signs {
            Signs::Tokens => move_token(direction),
            Signs::Text => direction.name().to_owned(),
        }
    }

    /// What is to be done and what the signs of a maze of `rows` x `columns` mean.
    fn legend(&self, rows: usize, columns: usize) -> String {
        let last = self.place(rows * columns - 1, columns);
        let first = self.place(0, columns);
        let moves = Direction::ALL.map(|direction| self.move_word(direction)).join(", ");
        let cells = match self.signs {
            Signs::Tokens => format!(
                "Three tokens stand for each cell:\n\
                 - its place, row before column: {first} is the upper left corner, {last} the lower right one\n\
                 - its walls: {}, {}, {} and so on name the sides that are closed\n\
                 - what is in it: <|origin|> where you begin, <|target|> where you must end, <|blank|> nothing\n",
                wall_token(0),
                wall_token(1),
                wall_token(6),
            ),
            Signs::Text => format!(
                "Each cell is written as place:walls:content:\n\
                 - its place, row before column: {first} is the upper left corner, {last} the lower right one\n\
                 - its walls: the closed sides, U up, D down, L left, R right, or - for none\n\
                 - what is in it: O where you begin, T where you must end, . nothing\n",
            ),
        };
        let thoughts = match self.thought {
            Thought::Direct => "Answer",
            _ => "Think step by step, one move at a time. Then answer",
        };
        format!(
            "Find the way through a maze, from its origin to its target. The maze is printed below, a line for each row \
             of cells. {cells}The moves are {moves}. A move goes to the next cell on that side and cannot go through a \
             wall.\n{thoughts} with the moves from origin to target and nothing else.\n{MAZE_LINE}\n",
        )
    }

    /// A reply that solves the maze, after the wrong attempts; and where it errs.
    pub(super) fn lines_reply(&self, maze: &Maze, path: &[Direction], wrong: &[Attempt]) -> Demonstrated {
        let answer = path.iter().map(|&direction| self.move_word(direction)).collect::<Vec<_>>().join(self.separator());
        if self.thought == Thought::Direct {
            return Demonstrated { text: answer, mistakes: Vec::new() };
        }
        let mut text = format!("{THINK}\n");
        let mut mistakes = Vec::new();
        for attempt in wrong {
            mistakes.push(self.steps(&mut text, maze, &attempt.steps, attempt.right));
            let end = if self.thought == Thought::Reprint { "\n\n" } else { "\n" };
            let message = message(attempt.dead_end, attempt.brief);
            let _ = write!(text, "{end}{message}\n{RESET_LINE}\n");
        }
        self.steps(&mut text, maze, path, 0);
        let _ = write!(text, "\n{END_THINK}\n\n{answer}");
        Demonstrated { text, mistakes }
    }

    /// Writes the steps of a walk; gives the bytes from the step number `right` on.
    fn steps(&self, text: &mut String, maze: &Maze, walk: &[Direction], right: usize) -> Range<usize> {
        let join = self.separator();
        let mut cell = maze.origin;
        if self.thought != Thought::Reprint {
            *text += &self.place(cell, maze.columns);
        }
        let mut begin = text.len();
        for (place, &direction) in walk.iter().enumerate() {
            if self.thought == Thought::Reprint && place > 0 {
                *text += "\n\n";
            }
            if place == right {
                begin = text.len();
            }
            let next = maze.step(cell, direction).expect("a walk of a demonstration goes through no wall");
            if self.thought == Thought::Reprint {
                let board = self.board(maze, Some((cell, direction)));
                let _ = write!(text, "{}\n{board}", step_line(place + 1, direction));
            } else {
                *text += &[join, &self.move_word(direction), join, &self.place(next, maze.columns)].concat();
            }
            cell = next;
        }
        begin..text.len()
    }

    /// The pieces of every text, but for the tokens.
    pub(super) fn words(&self) -> Vec<String> {
        let mut texts = vec!["\n".to_owned()];
        if self.prompt == MazePrompt::Legend {
            texts.push(self.legend(self.rows, self.columns));
        }
        if self.thought == Thought::Reprint {
            texts.extend(Direction::ALL.map(|direction| step_line(1, direction)));
        }
        if self.has_retries() {
            let messages = [(false, false), (false, true), (true, false), (true, true)];
            texts.extend(messages.map(|(dead_end, brief)| message(dead_end, brief)));
            texts.push(RESET_LINE.to_owned());
        }
        if self.signs == Signs::Text {
            texts.extend((0..=CLOSED).map(|mask| format!("0-0:{}:", wall_letters(mask))));
            texts.extend(LETTERS.map(|(_, letter)| format!(":{letter}")));
            texts.extend(Direction::ALL.map(|direction| format!("{0} {0}", direction.name())));
            texts.push(" ".to_owned());
        }
        let pieces = texts.iter().flat_map(|text| cut(text)).filter(|piece| token_length(piece).is_none());
        digits().chain(pieces.map(str::to_owned)).collect()
    }
}

/// A cell in plain characters, such as `0-3:UL:.`: row, column, walls, what is in it.
pub(super) fn text_cell(maze: &Maze, cell: usize, marker: &str) -> String {
    let letter = LETTERS.iter().find(|(name, _)| *name == marker).map_or("?", |(_, letter)| letter);
    format!("{}-{}:{}:{letter}", cell / maze.columns, cell % maze.columns, wall_letters(maze.walls[cell]))
}

/// Text as tokens, words, digits and characters.
pub(super) fn cut(text: &str) -> Vec<&str> {
    let (mut pieces, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(token_length(rest).unwrap_or_else(|| first_length(rest)));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

fn step_line(number: usize, direction: Direction) -> String {
    format!("Step {number}: Go {}", direction.name())
}

/// What is said when an attempt is given up.
fn message(dead_end: bool, brief: bool) -> String {
    let what = if dead_end { "Hit a dead end." } else { "Heading in the wrong direction." };
    let then = match (brief, dead_end) {
        (true, _) => "",
        (false, true) => " Go back to the origin and find another way.",
        (false, false) => " Go back to the origin and try a different path.",
    };
    what.to_owned() + then
}

/// The closed sides of a mask by their first letters.
fn wall_letters(mask: u8) -> String {
    let letters = Direction::ALL.into_iter().zip(["U", "D", "L", "R"]);
    let closed: String = letters.filter(|(side, _)| mask & side.bit() != 0).map(|(_, letter)| letter).collect();
    if closed.is_empty() { "-".to_owned() } else { closed }
}
