//! The maze itself: cells, walls, distances, and what makes two layouts the same.
//!
//! A cell is its index, row by row from the top left; a wall mask has a bit a side. Nothing here knows tokens or text.

use std::fmt::Write as _;

use anyhow::{bail, ensure};
use serde::{Deserialize, Serialize};

/// A step to a neighbouring cell, and the side of a cell that it leaves by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the row above.
    Up,
    /// To the row below.
    Down,
    /// To the column on the left.
    Left,
    /// To the column on the right.
    Right,
}

impl Direction {
    /// All four, in the order in which masks, tokens and names list them.
    pub const ALL: [Self; 4] = [Self::Up, Self::Down, Self::Left, Self::Right];

    /// The bit of the side in a wall mask: 1, 2, 4, 8.
    pub const fn bit(self) -> u8 {
        match self {
            Self::Up => 1,
            Self::Down => 2,
            Self::Left => 4,
            Self::Right => 8,
        }
    }

    /// The way back.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Up => Self::Down,
            Self::Down => Self::Up,
            Self::Left => Self::Right,
            Self::Right => Self::Left,
        }
    }

    /// Its word in token names.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Left => "left",
            Self::Right => "right",
        }
    }
}

/// All four sides walled.
pub(super) const CLOSED: u8 = 15;

/// A maze with its two endpoints; as JSON, the structured instance that is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Maze {
    /// Rows of cells.
    pub rows: usize,
    /// Columns of cells.
    pub columns: usize,
    /// A mask a cell of its walled sides: up 1, down 2, left 4, right 8.
    pub walls: Vec<u8>,
    /// The cell where the walk begins.
    pub origin: usize,
    /// The cell where the walk must end.
    pub target: usize,
    /// Moves of the shortest path from `origin` to `target`.
    pub length: usize,
}

impl Maze {
    /// The maze as JSON, byte for byte what `serde_json` writes of its value, whose keys are sorted.
    pub(super) fn to_json(&self) -> String {
        let Self { rows, columns, walls, origin, target, length } = self;
        let mut text = String::with_capacity(80 + 3 * walls.len());
        let _ = write!(
            text,
            r#"{{"columns":{columns},"length":{length},"origin":{origin},"rows":{rows},"target":{target},"walls":["#
        );
        for (cell, mask) in walls.iter().enumerate() {
            let _ = write!(text, "{}{mask}", if cell == 0 { "" } else { "," });
        }
        text + "]}"
    }

    /// The cell next to `cell`, whatever the walls; `None` beyond the edge.
    pub fn neighbour(&self, cell: usize, direction: Direction) -> Option<usize> {
        let (row, column) = (cell / self.columns, cell % self.columns);
        match direction {
            Direction::Up if row > 0 => Some(cell - self.columns),
            Direction::Down if row + 1 < self.rows => Some(cell + self.columns),
            Direction::Left if column > 0 => Some(cell - 1),
            Direction::Right if column + 1 < self.columns => Some(cell + 1),
            _ => None,
        }
    }

    /// The cell that a move leads to; `None` where a wall stands.
    pub fn step(&self, cell: usize, direction: Direction) -> Option<usize> {
        if self.walls[cell] & direction.bit() == 0 { self.neighbour(cell, direction) } else { None }
    }

    /// Moves from every cell to the target; `None` where there is no way.
    pub fn distances(&self) -> Vec<Option<usize>> {
        let mut distances = vec![None; self.walls.len()];
        distances[self.target] = Some(0);
        let mut queue = Vec::with_capacity(self.walls.len());
        queue.push((self.target, 0));
        let mut head = 0;
        while let Some(&(cell, distance)) = queue.get(head) {
            head += 1;
            for next in Direction::ALL.iter().filter_map(|&direction| self.step(cell, direction)) {
                if distances[next].is_none() {
                    distances[next] = Some(distance + 1);
                    queue.push((next, distance + 1));
                }
            }
        }
        distances
    }

    /// The moves of the shortest path from origin to target (of the first in the order of [`Direction::ALL`] where a
    /// maze has loops).
    pub fn path(&self) -> Vec<Direction> {
        let distances = self.distances();
        let mut path = Vec::with_capacity(self.length);
        let mut cell = self.origin;
        while cell != self.target {
            let closer = Direction::ALL.into_iter().find_map(|direction| {
                let next = self.step(cell, direction)?;
                (distances[next]? + 1 == distances[cell]?).then_some((direction, next))
            });
            let (direction, next) = closer.expect("a checked maze has a way from origin to target");
            path.push(direction);
            cell = next;
        }
        path
    }

    /// Whether the maze holds together: sizes, masks, edges, agreement of neighbours, endpoints and `length`.
    pub fn check(&self, rows: usize, columns: usize) -> anyhow::Result<()> {
        if (self.rows, self.columns) != (rows, columns) {
            bail!("the maze has {} x {} cells, the task {rows} x {columns}", self.rows, self.columns);
        }
        let cells = rows * columns;
        ensure!(self.walls.len() == cells, "the maze has {} wall masks for {cells} cells", self.walls.len());
        for (cell, &mask) in self.walls.iter().enumerate() {
            ensure!(mask <= CLOSED, "cell {cell} has the wall mask {mask}, above {CLOSED}");
            for direction in Direction::ALL {
                let open = mask & direction.bit() == 0;
                let agrees = match self.neighbour(cell, direction) {
                    Some(next) => open == (self.walls[next] & direction.opposite().bit() == 0),
                    None => !open,
                };
                ensure!(agrees, "the wall {} of cell {cell} is not what lies on its other side", direction.name());
            }
        }
        for (name, cell) in [("origin", self.origin), ("target", self.target)] {
            ensure!(cell < cells, "the {name} is cell {cell} of {cells}");
        }
        ensure!(self.origin != self.target, "origin and target are one cell, {}", self.origin);
        match self.distances()[self.origin] {
            None => bail!("no way leads from cell {} to cell {}", self.origin, self.target),
            Some(length) if length != self.length => bail!("`length` is {}, the path has {length} moves", self.length),
            Some(_) => Ok(()),
        }
    }
}

/// One of the rotations and reflections of a rectangle: where each cell and each side goes.
#[derive(Clone, Debug)]
pub(super) struct Symmetry {
    /// For each cell of the image, the cell it comes from.
    source: Vec<usize>,
    /// For each mask, its image.
    masks: [u8; 16],
}

/// The symmetries that keep `rows` x `columns`: eight for a square, else four; the identity first.
pub(super) fn symmetries(rows: usize, columns: usize) -> Vec<Symmetry> {
    let mut found = Vec::with_capacity(8);
    for transpose in [false, true] {
        if transpose && rows != columns {
            continue;
        }
        for (flip_rows, flip_columns) in [(false, false), (false, true), (true, false), (true, true)] {
            let source = (0..rows * columns)
                .map(|cell| {
                    let (row, column) = (cell / columns, cell % columns);
                    let row = if flip_rows { rows - 1 - row } else { row };
                    let column = if flip_columns { columns - 1 - column } else { column };
                    if transpose { column * columns + row } else { row * columns + column }
                })
                .collect();
            let side = |direction: Direction| {
                let direction = match (transpose, direction) {
                    (false, direction) => direction,
                    (true, Direction::Up) => Direction::Left,
                    (true, Direction::Left) => Direction::Up,
                    (true, Direction::Down) => Direction::Right,
                    (true, Direction::Right) => Direction::Down,
                };
                match direction {
                    Direction::Up | Direction::Down if flip_rows => direction.opposite(),
                    Direction::Left | Direction::Right if flip_columns => direction.opposite(),
                    direction => direction,
                }
            };
            let masks = std::array::from_fn(|mask| {
                let sides = Direction::ALL.into_iter().filter(|direction| mask as u8 & direction.bit() != 0);
                sides.map(|direction| side(direction).bit()).sum()
            });
            found.push(Symmetry { source, masks });
        }
    }
    found
}

/// The layout with rows and columns exchanged.
pub(super) fn transposed(walls: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let sides = [(1, 4), (2, 8), (4, 1), (8, 2)];
    let image = |mask: u8| sides.iter().filter(|(from, _)| mask & from != 0).map(|(_, to)| to).sum();
    (0..rows * columns).map(|cell| image(walls[cell % rows * columns + cell / rows])).collect()
}

impl Symmetry {
    /// The image of a layout.
    pub(super) fn apply<'a>(&'a self, walls: &'a [u8]) -> impl Iterator<Item = u8> + 'a {
        self.source.iter().map(|&cell| self.masks[usize::from(walls[cell] & CLOSED)])
    }
}

/// The lexicographically smallest image of a layout: equal for layouts that are rotations or reflections of each other.
pub(super) fn canonical(walls: &[u8], symmetries: &[Symmetry]) -> Vec<u8> {
    let mut best: Vec<u8> = walls.to_vec();
    for symmetry in symmetries {
        if symmetry.apply(walls).lt(best.iter().copied()) {
            best = symmetry.apply(walls).collect();
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random;
    use crate::tasks::maze::layout::Layouts;
    use crate::tasks::maze::spec::MazeSpec;

    fn maze(rows: usize, columns: usize, index: u64) -> Maze {
        Layouts::new(&MazeSpec::default()).draw(rows, columns, &mut random::rng("test", &[index]))
    }

    proptest! {
        #[test]
        fn every_image_has_the_same_canonical_form_and_is_a_maze(
            (rows, columns) in prop_oneof![Just((4usize, 4usize)), Just((3, 5)), Just((2, 2)), Just((5, 5))],
            index in 0u64..1_000_000,
        ) {
            let maze = maze(rows, columns, index);
            let symmetries = symmetries(rows, columns);
            let canonical_form = canonical(&maze.walls, &symmetries);
            for symmetry in &symmetries {
                let walls: Vec<u8> = symmetry.apply(&maze.walls).collect();
                prop_assert_eq!(&canonical(&walls, &symmetries), &canonical_form);
                let mut image = Maze { walls, ..maze.clone() };
                image.length = image.distances()[image.origin].unwrap();
                image.check(rows, columns).unwrap();
            }
        }
    }

    #[test]
    fn a_transposed_layout_is_a_maze_and_transposes_back() {
        let maze = maze(3, 5, 2);
        let walls = transposed(&maze.walls, 3, 5);
        let cell = |cell: usize| cell % 5 * 3 + cell / 5;
        let image = Maze {
            rows: 5,
            columns: 3,
            walls: walls.clone(),
            origin: cell(maze.origin),
            target: cell(maze.target),
            length: maze.length,
        };
        image.check(5, 3).unwrap();
        assert_eq!(transposed(&walls, 5, 3), maze.walls);
    }

    #[test]
    fn a_square_has_eight_different_images_and_a_rectangle_four() {
        let images = |rows, columns, index| {
            let walls = maze(rows, columns, index).walls;
            let symmetries = symmetries(rows, columns);
            let images: std::collections::BTreeSet<Vec<u8>> =
                symmetries.iter().map(|symmetry| symmetry.apply(&walls).collect()).collect();
            (symmetries.len(), images.len())
        };
        assert_eq!(images(6, 6, 1), (8, 8));
        assert_eq!(images(5, 6, 1), (4, 4));
    }

    #[test]
    fn starts_and_endpoints_cover_every_cell_evenly() {
        let mazes: Vec<Maze> = (0..4_000).map(|index| maze(3, 3, index)).collect();
        for cell in 0..9 {
            let origins = mazes.iter().filter(|maze| maze.origin == cell).count();
            let targets = mazes.iter().filter(|maze| maze.target == cell).count();
            // 4000 / 9 = 444 with a standard deviation of 20.
            assert!((344..545).contains(&origins) && (344..545).contains(&targets), "{cell}: {origins}, {targets}");
        }
        // A corner is a dead end more often than not; with a start that misses the last row or column the four corners
        // would differ by far more than chance.
        let dead_ends = |cell: usize| mazes.iter().filter(|maze| maze.walls[cell].count_ones() == 3).count() as f64;
        let corners = [0, 2, 6, 8].map(dead_ends);
        let mean = corners.iter().sum::<f64>() / 4.0;
        assert!(corners.iter().all(|count| (count - mean).abs() < 150.0), "{corners:?}");
    }

    #[test]
    fn what_does_not_hold_together_is_refused() {
        let good = maze(4, 4, 3);
        let says = |change: &dyn Fn(&mut Maze), words: &str| {
            let mut bad = good.clone();
            change(&mut bad);
            let error = bad.check(4, 4).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        says(&|maze| maze.walls[5] ^= 1, "is not what lies on its other side");
        says(&|maze| maze.walls[0] &= !1, "the wall up of cell 0");
        says(&|maze| maze.walls[0] = 16, "above 15");
        says(&|maze| maze.walls.truncate(15), "15 wall masks for 16 cells");
        says(&|maze| maze.rows = 5, "5 x 4");
        says(&|maze| maze.target = 16, "cell 16 of 16");
        says(&|maze| maze.target = maze.origin, "one cell");
        says(&|maze| maze.length += 1, "moves");
        says(&|maze| maze.walls.fill(CLOSED), "no way leads");
    }

    #[test]
    fn golden_layout() {
        insta::assert_debug_snapshot!(maze(5, 5, 7));
    }
}
