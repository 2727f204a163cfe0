//! The drawing as pixels: shapes covered with soft edges, written as a PNG.

use anyhow::Context as _;

use crate::tasks::maze::drawing::picture::{Picture, Rgb, Shape};

/// Pixels of an image for each pixel of a picture.
const SCALE: f64 = 2.0;

/// A PNG file and its size.
#[derive(Clone, Debug, PartialEq)]
pub struct Png {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// The file.
    pub bytes: Vec<u8>,
}

impl Picture {
    /// The picture as a PNG, two pixels for each of its own.
    pub fn png(&self) -> anyhow::Result<Png> {
        let image = Image::of(self);
        let (width, height) = (image.width as u32, image.height as u32);
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::RGB);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().context("cannot write a picture")?;
        writer.write_image_data(&image.pixels).context("cannot write a picture")?;
        drop(writer);
        Ok(Png { width, height, bytes })
    }
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

    #[test]
    fn a_png_shows_what_is_drawn() {
        let shapes = vec![
            Shape::Lines { lines: vec![vec![(0.0, 5.0), (10.0, 5.0)]], width: 2.0, color: [255, 0, 0] },
            Shape::Disc { at: (5.0, 5.0), radius: 3.0, color: [0, 0, 255] },
        ];
        let made = Picture { width: 10.0, height: 10.0, ground: [255; 3], shapes }.png().unwrap();
        assert_eq!((made.width, made.height), (20, 20));
        let (info, mut reader) = png::Decoder::new(made.bytes.as_slice()).read_info().unwrap();
        assert_eq!((info.width, info.color_type), (20, png::ColorType::RGB));
        let mut pixels = vec![0; info.buffer_size()];
        reader.next_frame(&mut pixels).unwrap();
        let at = |x: usize, y: usize| &pixels[3 * (20 * y + x)..][..3];
        assert_eq!((at(0, 0), at(1, 10), at(10, 10)), (&[255, 255, 255][..], &[255, 0, 0][..], &[0, 0, 255][..]));
    }
}
