//! Pictures side by side, as one picture.

use crate::tasks::maze::drawing::picture::{Picture, Shape};

/// Pixels between two pictures.
const GAP: f64 = 14.0;

/// The pictures in rows, about as wide as high.
pub(super) fn sheet(pictures: &[Picture]) -> Picture {
    let columns = (pictures.len() as f64).sqrt().ceil().max(1.0) as usize;
    let (mut shapes, mut top, mut width) = (Vec::new(), 0.0, 0.0_f64);
    for row in pictures.chunks(columns) {
        let mut left = 0.0;
        for picture in row {
            shapes.extend(picture.shapes.iter().map(|shape| moved(shape, left, top)));
            left += picture.width + GAP;
        }
        width = width.max(left - GAP);
        top += row.iter().map(|picture| picture.height).fold(0.0, f64::max) + GAP;
    }
    let ground = pictures.first().map_or([255; 3], |picture| picture.ground);
    Picture { width, height: (top - GAP).max(0.0), ground, shapes }
}

fn moved(shape: &Shape, right: f64, down: f64) -> Shape {
    let to = |(x, y): &(f64, f64)| (x + right, y + down);
    match shape {
        Shape::Lines { lines, width, color } => Shape::Lines {
            lines: lines.iter().map(|line| line.iter().map(to).collect()).collect(),
            width: *width,
            color: *color,
        },
        Shape::Disc { at, radius, color } => Shape::Disc { at: to(at), radius: *radius, color: *color },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::maze::drawing::picture::Rgb;

    fn dot(color: Rgb) -> Picture {
        let shapes = vec![
            Shape::Lines { lines: vec![vec![(0.0, 5.0), (10.0, 5.0)]], width: 2.0, color },
            Shape::Disc { at: (5.0, 5.0), radius: 3.0, color: [0, 0, 255] },
        ];
        Picture { width: 10.0, height: 10.0, ground: [255; 3], shapes }
    }

    #[test]
    fn pictures_stand_side_by_side() {
        let sheet = sheet(&[dot([255, 0, 0]), dot([0, 255, 0]), dot([0, 0, 0])]);
        assert_eq!((sheet.width, sheet.height), (10.0 + GAP + 10.0, 10.0 + GAP + 10.0));
        assert_eq!(sheet.shapes.len(), 6);
        let Shape::Disc { at, .. } = sheet.shapes[3] else { panic!("no disc") };
        assert_eq!(at, (5.0 + 10.0 + GAP, 5.0));
    }
}
