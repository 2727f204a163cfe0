//! The walks that demonstrations show: searches, and wrong attempts before the right path.

use rand_chacha::ChaCha8Rng;

use crate::random;
use crate::tasks::maze::grid::{Direction, Maze};
use crate::tasks::{Retry, SearchOrder};

/// Steps that a wrong attempt takes off the right path, at most.
const LONGEST: usize = 3;
/// A cell with one way in and out has so many walls.
const DEAD_END: u32 = 3;

/// A walk from the origin that leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attempt {
    /// Its steps.
    pub steps: Vec<Direction>,
    /// How many of them, from the first, are right.
    pub right: usize,
    /// It ends in a dead end.
    pub dead_end: bool,
    /// Several attempts follow each other, so it is given up in few words.
    pub brief: bool,
}

/// Wrong attempts at the maze whose right path is `path`, in the order in which they are made; none where the rule finds
/// none.
///
/// A wrong attempt never comes back to a cell, keeps off the right path once it has left it, and each of its wrong steps
/// leads away from the target. It has three steps where that is possible, else two, else one.
pub(super) fn attempts(maze: &Maze, path: &[Direction], from: Retry, random: &mut ChaCha8Rng) -> Vec<Attempt> {
    let wrong = Wrong::new(maze, path);
    let attempt = |right: usize, first: Option<Direction>, brief: bool, random: &mut ChaCha8Rng| {
        let (walk, last) = wrong.walk(wrong.cells[right], first, random)?;
        let steps = [&path[..right], &walk].concat();
        Some(Attempt { steps, right, dead_end: maze.walls[last].count_ones() == DEAD_END, brief })
    };
    match from {
        Retry::Origin => match maze.walls[maze.origin].count_ones() {
            2 => attempt(0, None, false, random).into_iter().collect(),
            1 => {
                let mut ways = wrong.ways(maze.origin, &[]);
                random::shuffle(random, &mut ways);
                ways.into_iter().filter_map(|(way, _)| attempt(0, Some(way), true, random)).collect()
            }
            _ => Vec::new(),
        },
        Retry::Junction => {
            let leaves = |&at: &usize| !wrong.ways(wrong.cells[at], &[]).is_empty();
            let junctions: Vec<usize> = (0..path.len()).filter(leaves).collect();
            if junctions.is_empty() {
                return Vec::new();
            }
            let right = junctions[random::below(random, junctions.len() as u64) as usize];
            attempt(right, None, false, random).into_iter().collect()
        }
    }
}

/// What is wrong in a maze.
struct Wrong<'a> {
    maze: &'a Maze,
    /// The cells of the right path, from the origin to the target.
    cells: Vec<usize>,
    distances: Vec<Option<usize>>,
}

impl<'a> Wrong<'a> {
    fn new(maze: &'a Maze, path: &[Direction]) -> Self {
        let mut cells = vec![maze.origin];
        for &direction in path {
            let next = maze.step(cells[cells.len() - 1], direction);
            cells.push(next.expect("the right path goes through no wall"));
        }
        Self { maze, cells, distances: maze.distances() }
    }

    /// The wrong ways on from a cell that do not lead to one of `been`, each with the cell it leads to.
    fn ways(&self, cell: usize, been: &[usize]) -> Vec<(Direction, usize)> {
        let way = |direction| {
            let next = self.maze.step(cell, direction)?;
            let away = self.distances[next] > self.distances[cell];
            (away && !self.cells.contains(&next) && !been.contains(&next)).then_some((direction, next))
        };
        Direction::ALL.into_iter().filter_map(way).collect()
    }

    /// A wrong walk from a cell of the right path, one of the longest that are short enough, and the cell it ends in.
    fn walk(&self, from: usize, first: Option<Direction>, random: &mut ChaCha8Rng) -> Option<(Vec<Direction>, usize)> {
        let mut walks: Vec<(Vec<Direction>, Vec<usize>)> = vec![(Vec::new(), vec![from])];
        for step in 0..LONGEST {
            let longer: Vec<_> = walks
                .iter()
                .flat_map(|(walk, been)| {
                    let ways = self.ways(been[been.len() - 1], been).into_iter();
                    let ways = ways.filter(move |(way, _)| step > 0 || first.is_none_or(|first| first == *way));
                    ways.map(|(way, next)| ([walk.as_slice(), &[way]].concat(), [been.as_slice(), &[next]].concat()))
                })
                .collect();
            if longer.is_empty() {
                break;
            }
            walks = longer;
        }
        let chosen = random::below(random, walks.len() as u64) as usize;
        let (walk, been) = walks.swap_remove(chosen);
        (!walk.is_empty()).then(|| (walk, been[been.len() - 1]))
    }
}

/// A depth-first search for the target: at every cell the ways on are tried in an order of their own, drawn at random
/// within what `order` says; a dead end is left cell by cell the way it was entered. Ends where the target is entered.
pub(super) fn search(maze: &Maze, order: SearchOrder, random: &mut ChaCha8Rng) -> Vec<Direction> {
    let away = |cell: usize| {
        let (row, column) = (cell / maze.columns, cell % maze.columns);
        row.abs_diff(maze.target / maze.columns) + column.abs_diff(maze.target % maze.columns)
    };
    let ways = |seen: &mut Vec<bool>, cell: usize, random: &mut ChaCha8Rng| {
        seen[cell] = true;
        let open = |&direction: &Direction| maze.step(cell, direction).is_some_and(|next| !seen[next]);
        let mut ways: Vec<Direction> = Direction::ALL.into_iter().filter(open).collect();
        random::shuffle(random, &mut ways);
        if order == SearchOrder::Toward {
            // The last one is tried first.
            ways.sort_by_key(|&direction| maze.step(cell, direction).is_some_and(|next| away(next) < away(cell)));
        }
        ways
    };
    let mut seen = vec![false; maze.walls.len()];
    let mut walk = Vec::new();
    let mut stack = vec![(maze.origin, None, ways(&mut seen, maze.origin, random))];
    while let Some((cell, entered, untried)) = stack.last_mut() {
        if *cell == maze.target {
            break;
        }
        if let Some(direction) = untried.pop() {
            let next = maze.step(*cell, direction).expect("only open ways are tried");
            // In a maze with loops another branch may have been there meanwhile.
            if !seen[next] {
                walk.push(direction);
                let ways = ways(&mut seen, next, random);
                stack.push((next, Some(direction), ways));
            }
        } else {
            let back = entered.map(Direction::opposite);
            walk.extend(back);
            stack.pop();
        }
    }
    walk
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::maze::layout::Layouts;
    use crate::tasks::maze::spec::{Algorithm, MazeSpec};

    fn maze(index: u64) -> Maze {
        Layouts::new(&MazeSpec::default()).draw(4, 5, &mut random::rng("test", &[index]))
    }

    #[test]
    fn a_search_walks_every_step_ends_on_the_target_and_varies_with_the_seed() {
        let mut walks = std::collections::BTreeSet::new();
        let maze = (0..100).map(maze).find(|maze| maze.length > 8).unwrap();
        for seed in 0..50 {
            let order = if seed % 2 == 0 { SearchOrder::Random } else { SearchOrder::Toward };
            let walk = search(&maze, order, &mut random::rng("trace", &[seed]));
            let mut cell = maze.origin;
            for (at, &direction) in walk.iter().enumerate() {
                assert!(cell != maze.target, "the search goes on at {at}");
                cell = maze.step(cell, direction).unwrap();
            }
            assert_eq!(cell, maze.target);
            assert!(walk.len() <= 2 * (maze.walls.len() - 1), "every edge is walked at most twice");
            walks.insert(walk.iter().map(|direction| direction.name()).collect::<Vec<_>>());
        }
        assert!(walks.len() > 1, "several seeds give several searches");
    }

    #[test]
    fn a_search_toward_the_target_is_shorter_on_average() {
        let steps = |order| -> usize {
            (0..200).map(|index| search(&maze(index), order, &mut random::rng("trace", &[index])).len()).sum()
        };
        let (random, toward) = (steps(SearchOrder::Random), steps(SearchOrder::Toward));
        assert!(toward * 100 < random * 95, "{toward} and {random}");
    }

    /// Checks what every wrong attempt promises.
    fn check(maze: &Maze, path: &[Direction], attempt: &Attempt) {
        let distances = maze.distances();
        let mut been = vec![maze.origin];
        for &step in &attempt.steps {
            been.push(maze.step(been[been.len() - 1], step).expect("an attempt goes through no wall"));
        }
        assert_eq!(attempt.steps[..attempt.right], path[..attempt.right]);
        assert!((1..=LONGEST).contains(&(attempt.steps.len() - attempt.right)));
        let mut right = vec![maze.origin];
        for &step in path {
            right.push(maze.step(right[right.len() - 1], step).unwrap());
        }
        for (place, pair) in been.windows(2).enumerate() {
            assert!(!been[..=place].contains(&pair[1]), "it comes back");
            if place >= attempt.right {
                assert!(!right.contains(&pair[1]), "it goes on by the right path");
                assert!(distances[pair[1]] > distances[pair[0]], "a step is right");
            }
        }
        let last = been[been.len() - 1];
        assert_eq!(attempt.dead_end, maze.walls[last].count_ones() == 3);
        if attempt.steps.len() - attempt.right < LONGEST {
            let on = Direction::ALL.into_iter().filter_map(|way| maze.step(last, way));
            let on: Vec<usize> = on.filter(|next| !been.contains(next) && !right.contains(next)).collect();
            assert!(on.iter().all(|&next| distances[next] < distances[last]), "it could be longer");
        }
    }

    #[test]
    fn attempts_from_the_origin_follow_its_walls() {
        let mut counts = [0; 4];
        for index in 0..2_000 {
            let maze = maze(index);
            let path = maze.path();
            let found = attempts(&maze, &path, Retry::Origin, &mut random::rng("attempt", &[index]));
            let walls = maze.walls[maze.origin].count_ones() as usize;
            counts[walls] += 1;
            assert_eq!(found.len(), [0, 2, 1, 0][walls], "{maze:?}");
            for attempt in &found {
                check(&maze, &path, attempt);
                assert_eq!((attempt.right, attempt.brief), (0, walls == 1));
            }
            if let [one, other] = &found[..] {
                assert_ne!(one.steps[0], other.steps[0], "each wrong way is tried once");
            }
        }
        assert!(counts[1] > 100 && counts[2] > 1_000 && counts[3] > 200, "{counts:?}");
    }

    #[test]
    fn attempts_from_a_junction_leave_the_path_anywhere() {
        let mut places = std::collections::BTreeMap::<usize, usize>::new();
        for (index, loops) in (0..2_000).map(|index| (index, if index % 2 == 0 { 0.0 } else { 0.2 })) {
            let spec = MazeSpec { loops, algorithm: Algorithm::Wilson, ..MazeSpec::default() };
            let maze = Layouts::new(&spec).draw(5, 5, &mut random::rng("test", &[index]));
            let path = maze.path();
            let found = attempts(&maze, &path, Retry::Junction, &mut random::rng("attempt", &[index]));
            assert!(found.len() <= 1);
            for attempt in &found {
                check(&maze, &path, attempt);
                *places.entry(attempt.right).or_default() += 1;
            }
        }
        assert!(places.values().sum::<usize>() > 1_500 && places.len() > 8, "{places:?}");
        assert!(places[&0] < 1_000 && places[&3] > 50, "{places:?}");
    }
}
