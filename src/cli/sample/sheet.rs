//! Pictures side by side, as one picture, and as the pixels of a PNG.

use crate::cli::failure::Failure;
use crate::tasks::maze::drawing::picture::{Picture, Rgb, Shape};

/// Pixels of an image for each pixel of a picture.
const SCALE: f64 = 2.0;

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

/// The picture as a PNG file.
pub(super) fn png(picture: &Picture) -> Result<Vec<u8>, Failure> {
    let failed = |error: png::EncodingError| Failure::failed(format!("cannot write the picture: {error}"));
    let image = Image::of(picture);
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, image.width as u32, image.height as u32);
    encoder.set_color(png::ColorType::RGB);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(&image.pixels).map_err(failed)?;
    drop(writer);
    Ok(bytes)
}

/// Pixels, three bytes each, row by row.
struct Image {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Image {
    fn of(picture: &Picture) -> Self {
        let pixels = |length: f64| (length * SCALE).ceil().max(1.0) as usize;
        let (width, height) = (pixels(picture.width), pixels(picture.height));
        let mut image = Self { width, height, pixels: picture.ground.repeat(width * height) };
        for shape in &picture.shapes {
            match shape {
                Shape::Lines { lines, width, color } => {
                    // What lies under a line of one colour twice is still covered once.
                    let mut cover = vec![0.0_f32; image.width * image.height];
                    for pair in lines.iter().flat_map(|line| line.windows(2)) {
                        image.cover(&mut cover, pair[0], pair[1], width / 2.0);
                    }
                    image.paint(&cover, *color);
                }
                Shape::Disc { at, radius, color } => {
                    let mut cover = vec![0.0_f32; image.width * image.height];
                    image.cover(&mut cover, *at, *at, *radius);
                    image.paint(&cover, *color);
                }
            }
        }
        image
    }

    /// Covers what lies within `radius` of the line between two points: a pixel at the edge in part.
    fn cover(&self, cover: &mut [f32], from: (f64, f64), to: (f64, f64), radius: f64) {
        let scaled = |(x, y): (f64, f64)| (x * SCALE, y * SCALE);
        let ((ax, ay), (bx, by), radius) = (scaled(from), scaled(to), radius * SCALE);
        let (dx, dy) = (bx - ax, by - ay);
        let length = dx * dx + dy * dy;
        let range = |one: f64, other: f64, most: usize| {
            let begin = (one.min(other) - radius - 1.0).floor().max(0.0) as usize;
            let end = (one.max(other) + radius + 1.0).ceil().max(0.0) as usize;
            begin..end.min(most)
        };
        for row in range(ay, by, self.height) {
            for column in range(ax, bx, self.width) {
                let (x, y) = (column as f64 + 0.5 - ax, row as f64 + 0.5 - ay);
                let along = if length > 0.0 { ((x * dx + y * dy) / length).clamp(0.0, 1.0) } else { 0.0 };
                let distance = (x - along * dx).hypot(y - along * dy);
                let part = (radius - distance + 0.5).clamp(0.0, 1.0) as f32;
                let place = row * self.width + column;
                cover[place] = cover[place].max(part);
            }
        }
    }

    fn paint(&mut self, cover: &[f32], color: Rgb) {
        for (pixel, part) in self.pixels.as_chunks_mut::<3>().0.iter_mut().zip(cover) {
            for (channel, wanted) in pixel.iter_mut().zip(color) {
                *channel = (f32::from(*channel) * (1.0 - part) + f32::from(wanted) * part).round() as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn pixels_are_painted_where_the_shapes_are() {
        let image = Image::of(&dot([255, 0, 0]));
        assert_eq!((image.width, image.height), (20, 20));
        let pixel = |x: usize, y: usize| &image.pixels[(y * 20 + x) * 3..][..3];
        assert_eq!(
            (pixel(0, 0), pixel(1, 9), pixel(10, 10)),
            (&[255, 255, 255][..], &[255, 0, 0][..], &[0, 0, 255][..])
        );
        let bytes = png(&dot([255, 0, 0])).unwrap();
        let decoder = png::Decoder::new(bytes.as_slice());
        let (info, mut reader) = decoder.read_info().unwrap();
        let mut pixels = vec![0; info.buffer_size()];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(((info.width, info.height), pixels), ((20, 20), image.pixels));
    }
}
