//! The drawing as shapes, for pictures of any kind, and as SVG.
//!
//! There are only lines and discs, and no letters: a picture needs no font, and whoever draws pixels needs no more than these.
//! Colours are plain, on a ground of their own, so that a picture is the same in a page, in an image and in print.

use std::fmt::Write as _;

use crate::tasks::maze::drawing::{Drawing, Outcome};
use crate::tasks::maze::grid::Direction;

/// Sizes in pixels: of a cell, and of the rim around the maze.
const CELL: f64 = 32.0;
const RIM: f64 = 6.0;
/// How far to the right of the middle of a corridor one walks, so that ways there and back lie side by side.
const ASIDE: f64 = 4.0;

/// A colour: red, green, blue.
pub type Rgb = [u8; 3];

const GROUND: Rgb = [255, 255, 255];
const WALL: Rgb = [28, 37, 48];
const ORIGIN: Rgb = [47, 111, 208];
const TARGET: Rgb = [44, 138, 87];
const WALK: Rgb = [47, 111, 208];
const MISTAKE: Rgb = [204, 43, 43];
const THOUGHT: Rgb = [150, 160, 172];
const WAY: Rgb = [220, 240, 228];

/// Something drawn.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// Lines from point to point, each line with round ends.
    Lines {
        /// One line of points each, in pixels from the top left.
        lines: Vec<Vec<(f64, f64)>>,
        /// How wide a line is, in pixels.
        width: f64,
        /// Its colour.
        color: Rgb,
    },
    /// A filled disc.
    Disc {
        /// Its middle, in pixels.
        at: (f64, f64),
        /// Its radius, in pixels.
        radius: f64,
        /// Its colour.
        color: Rgb,
    },
}

/// Shapes, each over those before it, on a ground.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Pixels.
    pub width: f64,
    /// Pixels.
    pub height: f64,
    /// What it is drawn on.
    pub ground: Rgb,
    /// What is drawn.
    pub shapes: Vec<Shape>,
}

impl Drawing {
    /// The drawing as shapes: the shortest way as a pale band, the reasoning as a thin grey line, the walk as a blue one on the
    /// right side of its corridors, mistakes in red; the origin is a blue disc, the target a green ring.
    pub fn picture(&self) -> Picture {
        let (rows, columns) = self.cells();
        let mut shapes = Vec::new();
        let mut add = |lines: Vec<Vec<(f64, f64)>>, width: f64, color: Rgb| {
            if !lines.is_empty() {
                shapes.push(Shape::Lines { lines, width, color });
            }
        };
        if self.is_answered {
            add(vec![self.way()], CELL * 0.5, WAY);
        }
        add(self.walls(), 2.5, WALL);
        let thought = self.thought.iter().map(|thought| (thought.from, thought.to, thought.is_move));
        let (right, wrong): (Vec<_>, Vec<_>) = thought.partition(|(_, _, is_move)| *is_move);
        let pair = |(from, to, _): &(usize, usize, bool)| vec![self.middle(*from), self.middle(*to)];
        add(right.iter().map(pair).collect(), 1.5, THOUGHT);
        add(wrong.iter().map(pair).collect(), 1.0, MISTAKE);
        add(self.walked(Outcome::Moved), 3.0, WALK);
        add(self.walked(Outcome::Past), 3.0, MISTAKE);
        add(self.hits(), 2.5, MISTAKE);
        if !self.steps.is_empty() && self.end() != self.maze.target {
            add(cross(self.middle(self.end()), 5.0), 3.0, MISTAKE);
        }
        let disc = |cell: usize, radius: f64, color: Rgb| Shape::Disc { at: self.middle(cell), radius, color };
        shapes.push(disc(self.maze.origin, 6.0, ORIGIN));
        shapes.extend([(9.0, TARGET), (5.5, GROUND), (3.0, TARGET)].map(|ring| disc(self.maze.target, ring.0, ring.1)));
        let side = |cells: usize| cells as f64 * CELL + 2.0 * RIM;
        Picture { width: side(columns), height: side(rows), ground: GROUND, shapes }
    }

    fn middle(&self, cell: usize) -> (f64, f64) {
        let place = |index: usize| RIM + (index as f64 + 0.5) * CELL;
        (place(cell % self.maze.columns), place(cell / self.maze.columns))
    }

    fn way(&self) -> Vec<(f64, f64)> {
        let mut cell = self.maze.origin;
        let mut points = vec![self.middle(cell)];
        for direction in self.maze.path() {
            cell = self.maze.step(cell, direction).unwrap_or(cell);
            points.push(self.middle(cell));
        }
        points
    }

    /// Each wall once, walls in a row as one line.
    fn walls(&self) -> Vec<Vec<(f64, f64)>> {
        let (rows, columns) = self.cells();
        let stands = |cell: usize, side: Direction| self.maze.walls[cell] & side.bit() != 0;
        let across = |row: usize, column: usize| match row {
            row if row < rows => stands(row * columns + column, Direction::Up),
            row => stands((row - 1) * columns + column, Direction::Down),
        };
        let down = |column: usize, row: usize| match column {
            column if column < columns => stands(row * columns + column, Direction::Left),
            column => stands(row * columns + column - 1, Direction::Right),
        };
        let place = |index: usize| RIM + index as f64 * CELL;
        let mut lines = Vec::new();
        for row in 0..=rows {
            for (from, to) in runs(columns, |column| across(row, column)) {
                lines.push(vec![(place(from), place(row)), (place(to), place(row))]);
            }
        }
        for column in 0..=columns {
            for (from, to) in runs(rows, |row| down(column, row)) {
                lines.push(vec![(place(column), place(from)), (place(column), place(to))]);
            }
        }
        lines
    }

    /// The moves with an outcome, joined where one follows the other, each on the right side of its corridor.
    fn walked(&self, outcome: Outcome) -> Vec<Vec<(f64, f64)>> {
        let mut lines: Vec<Vec<(f64, f64)>> = Vec::new();
        let mut before = None;
        for step in self.steps.iter().filter(|step| step.outcome != Outcome::Wall) {
            if step.outcome == outcome {
                let aside = aside(step.direction);
                let shifted = |cell: usize| {
                    let (x, y) = self.middle(cell);
                    (x + aside.0, y + aside.1)
                };
                let (from, to) = (shifted(step.from), shifted(step.to));
                match (lines.last_mut(), before) {
                    (Some(line), Some(previous)) => {
                        // A turn has one corner, where both lanes meet; a way back crosses to the other lane.
                        if previous != step.direction && previous != step.direction.opposite() {
                            let corner = corner(line[line.len() - 1], from, previous);
                            line.pop();
                            line.push(corner);
                        } else if previous == step.direction {
                            line.pop();
                        } else {
                            line.push(from);
                        }
                        line.push(to);
                    }
                    _ => lines.push(vec![from, to]),
                }
                before = Some(step.direction);
            } else {
                before = None;
            }
        }
        lines
    }

    /// A spur and a cross where a move runs into a wall.
    fn hits(&self) -> Vec<Vec<(f64, f64)>> {
        let hits = self.steps.iter().filter(|step| step.outcome == Outcome::Wall);
        let mut drawn = std::collections::BTreeSet::new();
        let mut lines = Vec::new();
        for step in hits.filter(|step| drawn.insert((step.from, step.direction.bit()))) {
            let (x, y) = self.middle(step.from);
            let (dx, dy) = unit(step.direction);
            let at = |far: f64| (x + dx * far, y + dy * far);
            lines.push(vec![at(0.0), at(CELL / 2.0 - 6.0)]);
            lines.extend(cross(at(CELL / 2.0), 4.0));
        }
        lines
    }
}

impl Picture {
    /// The picture as an SVG document.
    pub fn svg(&self) -> String {
        let hex = |[red, green, blue]: Rgb| format!("#{red:02x}{green:02x}{blue:02x}");
        let (width, height) = (self.width, self.height);
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
             fill=\"none\" stroke-linecap=\"round\" stroke-linejoin=\"round\">\n<rect width=\"{width}\" height=\"{height}\" \
             fill=\"{}\"/>\n",
            hex(self.ground)
        );
        for shape in &self.shapes {
            match shape {
                Shape::Lines { lines, width, color } => {
                    let mut path = String::new();
                    for line in lines {
                        for (place, (x, y)) in line.iter().enumerate() {
                            let _ = write!(path, "{}{x} {y}", if place == 0 { 'M' } else { 'L' });
                        }
                    }
                    let _ = writeln!(text, "<path d=\"{path}\" stroke=\"{}\" stroke-width=\"{width}\"/>", hex(*color));
                }
                Shape::Disc { at: (x, y), radius, color } => {
                    let _ = writeln!(text, "<circle cx=\"{x}\" cy=\"{y}\" r=\"{radius}\" fill=\"{}\"/>", hex(*color));
                }
            }
        }
        text + "</svg>\n"
    }
}

fn cross((x, y): (f64, f64), arm: f64) -> Vec<Vec<(f64, f64)>> {
    vec![vec![(x - arm, y - arm), (x + arm, y + arm)], vec![(x - arm, y + arm), (x + arm, y - arm)]]
}

fn unit(direction: Direction) -> (f64, f64) {
    match direction {
        Direction::Up => (0.0, -1.0),
        Direction::Down => (0.0, 1.0),
        Direction::Left => (-1.0, 0.0),
        Direction::Right => (1.0, 0.0),
    }
}

/// From the middle to the right of who walks in a direction.
fn aside(direction: Direction) -> (f64, f64) {
    let (dx, dy) = unit(direction);
    (-dy * ASIDE, dx * ASIDE)
}

/// Where the lane that ends at `end`, walked in `direction`, meets the crosswise one that begins at `begin`.
fn corner(end: (f64, f64), begin: (f64, f64), direction: Direction) -> (f64, f64) {
    match direction {
        Direction::Up | Direction::Down => (end.0, begin.1),
        Direction::Left | Direction::Right => (begin.0, end.1),
    }
}

/// The stretches of `0..count` for which something holds.
fn runs(count: usize, holds: impl Fn(usize) -> bool) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for index in (0..count).filter(|index| holds(*index)) {
        match runs.last_mut() {
            Some(run) if run.1 == index => run.1 = index + 1,
            _ => runs.push((index, index + 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::maze::drawing::tests::fixed;

    fn picture(moves: &str) -> Picture {
        let reply = format!("<think><|0-0|><|1-0|><|0-2|></think>{moves}");
        Drawing::new(fixed(), Some(&reply)).picture()
    }

    #[test]
    fn the_picture_of_a_walk_with_mistakes() {
        insta::assert_snapshot!(
            picture("<|right|><|down|><|right|><|up|><|down|><|right|><|up|><|down|><|left|>").svg()
        );
    }

    #[test]
    fn walls_in_a_row_are_one_line_and_all_lies_in_the_picture() {
        let picture = picture("<|down|><|right|><|right|><|up|>");
        let Some(Shape::Lines { lines, .. }) = picture.shapes.get(1) else { panic!("no walls") };
        // The rim's four sides, two walls between the upper cells.
        assert_eq!(lines.len(), 6);
        for shape in &picture.shapes {
            let points = match shape {
                Shape::Lines { lines, .. } => lines.iter().flatten().copied().collect(),
                Shape::Disc { at, .. } => vec![*at],
            };
            assert!(
                points.iter().all(|(x, y)| (0.0..=picture.width).contains(x) && (0.0..=picture.height).contains(y))
            );
        }
        assert!(picture.svg().len() < 2_000);
    }
}
