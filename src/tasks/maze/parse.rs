//! A maze read back from a prompt in AlphaMaze's tokens, whoever wrote it.

use anyhow::{Context as _, bail, ensure};

use crate::tasks::maze::answer::Pieces;
use crate::tasks::maze::format::wall_token;
use crate::tasks::maze::grid::{CLOSED, Maze};
use crate::tasks::maze::lines::MAZE_LINE;

/// A cell as a prompt shows it.
#[derive(Clone, Copy, Debug)]
struct Cell {
    row: usize,
    column: usize,
    mask: u8,
}

/// The maze that stands behind the last line `MAZE:` of a prompt, or else behind nothing but its cells: each a place, its
/// walls and what is in it. Whatever stands between cells is left out; what stands within one is an error.
pub(super) fn maze(prompt: &str) -> anyhow::Result<Maze> {
    let text = prompt.rsplit_once(MAZE_LINE).map_or(prompt, |(_, maze)| maze);
    let mut tokens = Pieces(text).filter(|piece| piece.starts_with("<|"));
    let (mut cells, mut origin, mut target) = (Vec::new(), None, None);
    while let Some(token) = tokens.next() {
        // A chat template's signs may stand before and behind the maze.
        let Some((row, column)) = place(token) else { continue };
        let mut next = || tokens.next().with_context(|| format!("the cell {token} is not whole"));
        let walls = next()?;
        let mask = (0..=CLOSED).find(|&mask| wall_token(mask) == walls);
        let mask = mask.with_context(|| format!("`{walls}` behind {token} names no walls"))?;
        let found = match next()? {
            "<|origin|>" => Some(&mut origin),
            "<|target|>" => Some(&mut target),
            "<|blank|>" => None,
            other => bail!("`{other}` in the cell {token} is neither origin nor target nor blank"),
        };
        if let Some(found) = found {
            ensure!(found.is_none(), "the maze has two cells like {token}: one origin and one target are needed");
            *found = Some((row, column));
        }
        cells.push(Cell { row, column, mask });
    }
    let last = cells.last().context("there is no cell of a maze in the prompt")?;
    let (rows, columns) = (last.row + 1, last.column + 1);
    ensure!(cells.len() == rows * columns, "the maze ends at {}-{} with {} cells", last.row, last.column, cells.len());
    for (at, cell) in cells.iter().enumerate() {
        let in_order = (cell.row, cell.column) == (at / columns, at % columns);
        ensure!(
            in_order,
            "the cell {}-{} stands where {}-{} should",
            cell.row,
            cell.column,
            at / columns,
            at % columns
        );
    }
    let index = |found: Option<(usize, usize)>, name: &str| {
        let (row, column) = found.with_context(|| format!("the maze has no {name}"))?;
        anyhow::Ok(row * columns + column)
    };
    let walls = cells.iter().map(|cell| cell.mask).collect();
    let (origin, target) = (index(origin, "origin")?, index(target, "target")?);
    let mut maze = Maze { rows, columns, walls, origin, target, length: 0 };
    let length = maze.distances()[maze.origin];
    maze.length = length.with_context(|| format!("no way leads from cell {origin} to cell {target}"))?;
    Ok(maze)
}

/// Row and column of a coordinate.
fn place(token: &str) -> Option<(usize, usize)> {
    let (row, column) = token.strip_prefix("<|")?.strip_suffix("|>")?.split_once('-')?;
    Some((row.parse::<u8>().ok()?.into(), column.parse::<u8>().ok()?.into()))
}
