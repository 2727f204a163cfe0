//! How mazes are drawn: spanning trees of the grid by three algorithms, extra openings, and endpoints.
//!
//! A maze is a function of the generator alone. Nothing here knows tokens or splits.

use rand_chacha::ChaCha8Rng;

use crate::random;
use crate::tasks::maze::grid::{CLOSED, Direction, Maze};
use crate::tasks::maze::spec::{Algorithm, MazeSpec, StartLaw};

/// The law of layouts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Layouts {
    algorithm: Algorithm,
    start: StartLaw,
    loops: f64,
}

impl Layouts {
    /// The law that a file asks for.
    pub(super) fn new(spec: &MazeSpec) -> Self {
        Self { algorithm: spec.algorithm, start: spec.start, loops: spec.loops }
    }

    /// Draws a layout of `rows` x `columns` cells and two distinct uniformly random endpoints.
    pub(super) fn draw(self, rows: usize, columns: usize, random: &mut ChaCha8Rng) -> Maze {
        let cells = rows * columns;
        let mut maze = Maze { rows, columns, walls: vec![CLOSED; cells], origin: 0, target: 0, length: 0 };
        match self.algorithm {
            Algorithm::Dfs => {
                let start = match self.start {
                    StartLaw::Any => random::below(random, cells as u64),
                    StartLaw::MazeDataset => {
                        let row = random::below(random, rows as u64 - 1);
                        row * columns as u64 + random::below(random, columns as u64 - 1)
                    }
                };
                depth_first(&mut maze, start as usize, random);
            }
            Algorithm::Wilson => wilson(&mut maze, random),
            Algorithm::Kruskal => kruskal(&mut maze, random),
        }
        if self.loops > 0.0 {
            let mut walls: Vec<(usize, Direction)> =
                inner_sides(&maze).filter(|&(cell, side)| maze.walls[cell] & side.bit() != 0).collect();
            random::shuffle(random, &mut walls);
            let opened = (self.loops * walls.len() as f64).round() as usize;
            for &(cell, side) in &walls[..opened.min(walls.len())] {
                open(&mut maze, cell, side);
            }
        }
        maze.origin = random::below(random, cells as u64) as usize;
        maze.target = random::below(random, cells as u64 - 1) as usize;
        maze.target += usize::from(maze.target >= maze.origin);
        maze.length = maze.distances()[maze.origin].expect("a spanning tree reaches every cell");
        maze
    }
}

/// Takes the wall away between a cell and its neighbour, which must exist.
fn open(maze: &mut Maze, cell: usize, side: Direction) {
    let next = maze.neighbour(cell, side).expect("only walls between cells are opened");
    maze.walls[cell] &= !side.bit();
    maze.walls[next] &= !side.opposite().bit();
}

/// Every side that parts two cells, once.
fn inner_sides(maze: &Maze) -> impl Iterator<Item = (usize, Direction)> + '_ {
    let sides = |cell| [Direction::Right, Direction::Down].map(|side| (cell, side));
    (0..maze.walls.len()).flat_map(sides).filter(|&(cell, side)| maze.neighbour(cell, side).is_some())
}

/// Randomised depth-first search: each step goes to a uniformly random unvisited neighbour of the newest cell that has
/// one.
fn depth_first(maze: &mut Maze, start: usize, random: &mut ChaCha8Rng) {
    let mut stack = Vec::with_capacity(maze.walls.len());
    stack.push(start);
    while let Some(&cell) = stack.last() {
        let mut ways = [(Direction::Up, 0); 4];
        let mut count = 0;
        for direction in Direction::ALL {
            // A cell with all its walls has not been visited, unless it is the start before its first step.
            match maze.neighbour(cell, direction) {
                Some(next) if maze.walls[next] == CLOSED && next != start => {
                    ways[count] = (direction, next);
                    count += 1;
                }
                _ => {}
            }
        }
        if count == 0 {
            stack.pop();
            continue;
        }
        let (direction, next) = ways[random::below(random, count as u64) as usize];
        maze.walls[cell] &= !direction.bit();
        maze.walls[next] &= !direction.opposite().bit();
        stack.push(next);
    }
}

/// Wilson's algorithm: from every cell that is no part of the tree yet a random walk leads to the tree, and what is left
/// of it without its loops joins. Uniform over spanning trees whatever the root and the order of cells.
fn wilson(maze: &mut Maze, random: &mut ChaCha8Rng) {
    let cells = maze.walls.len();
    let mut joined = vec![false; cells];
    joined[0] = true;
    // The way by which the walk left a cell last: what is overwritten was a loop.
    let mut left = vec![Direction::Up; cells];
    for first in 1..cells {
        let mut cell = first;
        while !joined[cell] {
            let mut ways = [(Direction::Up, 0); 4];
            let mut count = 0;
            for direction in Direction::ALL {
                if let Some(next) = maze.neighbour(cell, direction) {
                    ways[count] = (direction, next);
                    count += 1;
                }
            }
            let (direction, next) = ways[random::below(random, count as u64) as usize];
            left[cell] = direction;
            cell = next;
        }
        cell = first;
        while !joined[cell] {
            joined[cell] = true;
            let direction = left[cell];
            open(maze, cell, direction);
            cell = maze.neighbour(cell, direction).expect("the walk stayed inside");
        }
    }
}

/// Kruskal's algorithm with random weights: the walls in random order, each opened where it parts two regions.
fn kruskal(maze: &mut Maze, random: &mut ChaCha8Rng) {
    let mut sides: Vec<(usize, Direction)> = inner_sides(maze).collect();
    random::shuffle(random, &mut sides);
    let mut region: Vec<usize> = (0..maze.walls.len()).collect();
    for (cell, side) in sides {
        let next = maze.neighbour(cell, side).expect("an inner side has two cells");
        let (one, other) = (root(&mut region, cell), root(&mut region, next));
        if one != other {
            region[one] = other;
            open(maze, cell, side);
        }
    }
}

/// The cell that stands for the region of `cell`; shortens the way to it.
fn root(region: &mut [usize], mut cell: usize) -> usize {
    while region[cell] != cell {
        region[cell] = region[region[cell]];
        cell = region[cell];
    }
    cell
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn law(algorithm: Algorithm, loops: f64) -> Layouts {
        Layouts { algorithm, start: StartLaw::Any, loops }
    }

    fn algorithms() -> impl Strategy<Value = Algorithm> {
        prop_oneof![Just(Algorithm::Dfs), Just(Algorithm::Wilson), Just(Algorithm::Kruskal)]
    }

    fn openings(maze: &Maze) -> usize {
        maze.walls.iter().map(|mask| 4 - mask.count_ones() as usize).sum::<usize>() / 2
    }

    proptest! {
        #[test]
        fn a_drawn_layout_is_a_spanning_tree(
            algorithm in algorithms(), rows in 2usize..12, columns in 2usize..12, index in 0u64..1_000_000,
        ) {
            let maze = law(algorithm, 0.0).draw(rows, columns, &mut random::rng("test", &[index]));
            maze.check(rows, columns).unwrap();
            prop_assert_eq!(openings(&maze), rows * columns - 1, "a connected graph with cells - 1 edges is a tree");
            prop_assert!(maze.distances().iter().all(Option::is_some));
            let end = maze.path().iter().try_fold(maze.origin, |cell, &direction| maze.step(cell, direction));
            prop_assert_eq!(end, Some(maze.target));
            prop_assert_eq!(maze.path().len(), maze.length);
        }

        #[test]
        fn loops_open_their_share_of_the_walls_that_are_left(
            algorithm in algorithms(), size in 2usize..9, share in 0.0f64..=1.0, index in 0u64..1_000_000,
        ) {
            let maze = law(algorithm, share).draw(size, size, &mut random::rng("test", &[index]));
            maze.check(size, size).unwrap();
            let (inner, tree) = (2 * size * (size - 1), size * size - 1);
            prop_assert_eq!(openings(&maze), tree + (share * (inner - tree) as f64).round() as usize);
            prop_assert_eq!(maze.path().len(), maze.length, "the length is that of a shortest path");
        }
    }

    /// How often each layout of 2 x 3 cells is drawn; there are 15 spanning trees.
    fn trees(algorithm: Algorithm) -> Vec<usize> {
        let mut counts: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
        for index in 0..15_000 {
            let maze = law(algorithm, 0.0).draw(2, 3, &mut random::rng("trees", &[index]));
            *counts.entry(maze.walls).or_default() += 1;
        }
        counts.into_values().collect()
    }

    #[test]
    fn wilson_is_uniform_over_trees_and_the_others_are_not() {
        let chi_square =
            |counts: &[usize]| -> f64 { counts.iter().map(|&count| (count as f64 - 1_000.0).powi(2) / 1_000.0).sum() };
        let uniform = trees(Algorithm::Wilson);
        assert_eq!(uniform.len(), 15);
        // 14 degrees of freedom: 42.6 is the quantile of 0.9999.
        assert!(chi_square(&uniform) < 42.6, "{uniform:?}");
        for algorithm in [Algorithm::Dfs, Algorithm::Kruskal] {
            let counts = trees(algorithm);
            assert!(counts.len() >= 14 && chi_square(&counts) > 80.0, "{algorithm:?}: {counts:?}");
        }
    }

    #[test]
    fn the_start_of_maze_dataset_misses_the_last_row_and_column() {
        let dead_ends = |start: StartLaw, cell: usize| {
            let law = Layouts { algorithm: Algorithm::Dfs, start, loops: 0.0 };
            let mazes = (0..4_000).map(|index| law.draw(3, 3, &mut random::rng("start", &[index])));
            mazes.filter(|maze| maze.walls[cell].count_ones() == 3).count() as f64
        };
        // A search that begins in a corner leaves it by one way more often than not.
        let (first, last) = (dead_ends(StartLaw::MazeDataset, 0), dead_ends(StartLaw::MazeDataset, 8));
        assert!(first > last + 800.0, "{first} and {last}");
        let (first, last) = (dead_ends(StartLaw::Any, 0), dead_ends(StartLaw::Any, 8));
        assert!((last - first).abs() < 200.0, "{first} and {last}");
    }
}
