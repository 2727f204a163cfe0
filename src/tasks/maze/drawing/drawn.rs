//! A drawn maze read back as an instance: what [`Drawing::lines`](super::Drawing::lines) writes, and `+--+` as well.

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::tasks::maze::grid::{Direction, Maze};

/// The instance that a drawing shows; an error says where it is none. Marks of a walk are left out.
pub fn read(text: &str) -> anyhow::Result<Value> {
    let lines: Vec<Vec<char>> = text
        .lines()
        .map(|line| line.trim_end().chars().collect())
        .filter(|line: &Vec<char>| !line.is_empty())
        .collect();
    let margin = lines.iter().map(|line| line.iter().take_while(|one| **one == ' ').count()).min().unwrap_or(0);
    let lines: Vec<Vec<char>> = lines.into_iter().map(|line| line[margin..].to_vec()).collect();
    ensure!(lines.len() >= 5 && lines.len() % 2 == 1, "a drawn maze has an odd number of lines, 5 at least");
    let width = lines[0].len();
    // Cells are three characters wide, of which the middle one is written on, or one, which `O` stands in.
    let is_blank = |line: &Vec<char>| line.iter().skip(1).step_by(2).all(|mark| *mark == ' ');
    let is_narrow = !lines.iter().skip(1).step_by(2).all(is_blank);
    let pitch = if is_narrow { 2 } else { 4 };
    ensure!(width > 2 * pitch && width % pitch == 1, "the first line of a drawn maze has no whole number of cells");
    let (rows, columns) = (lines.len() / 2, width / pitch);
    let at = |line: usize, place: usize| lines[line].get(place).copied().unwrap_or(' ');
    let mut walls = Vec::with_capacity(rows * columns);
    let (mut origin, mut target) = (None, None);
    for row in 0..rows {
        for column in 0..columns {
            let (line, place) = (2 * row + 1, pitch * column + pitch / 2);
            let sides = [
                (Direction::Up, at(line - 1, place)),
                (Direction::Down, at(line + 1, place)),
                (Direction::Left, at(line, pitch * column)),
                (Direction::Right, at(line, pitch * (column + 1))),
            ];
            let mask: u8 = sides.iter().filter(|(_, mark)| is_wall(*mark)).map(|(side, _)| side.bit()).sum();
            walls.push(mask);
            let end = match at(line, place) {
                'O' | 'o' => &mut origin,
                'T' | 't' => &mut target,
                _ => continue,
            };
            if end.replace(row * columns + column).is_some() {
                bail!("the drawn maze has two cells `{}`", at(line, place));
            }
        }
    }
    let origin = origin.context("the drawn maze has no cell `O`, where the walk begins")?;
    let target = target.context("the drawn maze has no cell `T`, where it must end")?;
    let mut instance =
        json!({"rows": rows, "columns": columns, "walls": walls, "origin": origin, "target": target, "length": 0});
    let maze = Maze::deserialize(&instance).context("the drawing is no maze")?;
    let length = maze.distances()[origin].context("no way leads from `O` to `T`")?;
    instance["length"] = json!(length);
    Maze::deserialize(&instance)?.check(rows, columns).context("the drawn maze does not hold together")?;
    Ok(instance)
}

/// Whether a mark between two cells is a wall; a move against one stands in its place.
fn is_wall(mark: char) -> bool {
    matches!(mark, '─' | '│' | '-' | '|' | '_' | '✗')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;
    use crate::tasks::maze::MazeSpec;
    use crate::tasks::maze::drawing::Drawing;
    use crate::tasks::maze::layout::Layouts;

    #[test]
    fn whatever_is_drawn_is_read_back() {
        for index in 0..30 {
            let (rows, columns) = (2 + index as usize % 5, 2 + index as usize % 7);
            let layouts = Layouts::new(&MazeSpec::default());
            let maze = layouts.draw(rows, columns, &mut random::rng("test", &[index]));
            let wanted = serde_json::to_value(&maze).unwrap();
            for reply in [None, Some("<think><|0-0|><|0-1|></think><|up|><|left|><|down|><|right|><|down|>")] {
                let drawing = Drawing::new(maze.clone(), reply);
                for narrow in [false, true] {
                    let line =
                        |line: Vec<super::super::Span>| line.into_iter().map(|span| span.text).collect::<String>();
                    let text: Vec<String> = drawing.lines(narrow).into_iter().map(line).collect();
                    let read = read(&format!("\n  {}\n", text.join("\n  "))).unwrap();
                    assert_eq!(read, wanted, "{}", text.join("\n"));
                }
            }
        }
    }

    #[test]
    fn plain_characters_do_and_what_is_no_maze_is_told() {
        let text = "+---+---+\n| O     |\n+---+   +\n| T     |\n+---+---+\n";
        let maze = read(text).unwrap();
        assert_eq!((&maze["origin"], &maze["target"], &maze["length"]), (&json!(0), &json!(2), &json!(3)));
        let says = |text: &str| format!("{:#}", read(text).unwrap_err());
        assert!(says("nothing").contains("odd number of lines"));
        assert!(says(&text.replace('T', " ")).contains("no cell `T`"));
        assert!(says(&text.replace('T', "O")).contains("two cells `O`"));
        assert!(says(&text.replace("+   +", "+---+")).contains("no way leads"));
        assert!(says(&text.replace("|\n", " \n")).contains("does not hold together"));
    }
}
