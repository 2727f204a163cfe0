//! Where the tokens of a batch stand: sequences one behind another without padding, and which of them go on from another.
//!
//! A segment attends causally to itself and wholly to its parent, whose positions it continues: samples of one prompt are
//! children of a segment that is computed once. It knows no ids and no heads.

use std::cell::OnceCell;

use tch::{Device, Tensor};

/// The segments of a batch of `N` tokens.
#[derive(Debug)]
pub struct Layout {
    /// First token, tokens, parent (-1: none) of each; children stand behind their parent.
    segments: Vec<[i64; 3]>,
    /// `[S, 3]` i64 on the processor: the same.
    table: Tensor,
    /// `[N]` i64 on the device: the position of each token in its sequence.
    positions: Tensor,
    /// The longest sequence.
    longest: i64,
    padded: OnceCell<Padded>,
}

/// A segment to be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Tokens, one at least.
    pub length: usize,
    /// Whether it goes on from the last segment that does not.
    pub continues: bool,
}

impl Layout {
    /// Segments side by side in the order given. The first of them continues nothing.
    pub fn new(segments: &[Segment], device: Device) -> Self {
        let (mut rows, mut positions) = (Vec::with_capacity(segments.len()), Vec::new());
        let (mut first, mut root, mut longest) = (0, None, 0);
        for (index, segment) in segments.iter().enumerate() {
            let length = segment.length as i64;
            assert!(length > 0, "the segment {index} is empty");
            let (parent, before) = if segment.continues { root.expect("a segment to go on from") } else { (-1, 0) };
            if !segment.continues {
                root = Some((index as i64, length));
            }
            rows.push([first, length, parent]);
            positions.extend(before..before + length);
            first += length;
            longest = longest.max(before + length);
        }
        let table = Tensor::from_slice(rows.as_flattened()).view([-1, 3]);
        let positions = Tensor::from_slice(&positions).to_device(device);
        Self { segments: rows, table, positions, longest, padded: OnceCell::new() }
    }

    /// Sequences of these lengths, none of which continues another.
    pub fn rows(lengths: impl IntoIterator<Item = usize>, device: Device) -> Self {
        let segments: Vec<Segment> = lengths.into_iter().map(|length| Segment { length, continues: false }).collect();
        Self::new(&segments, device)
    }

    /// `[S, 3]` i64 on the processor: first token, tokens and parent (-1: none) of each segment.
    pub fn table(&self) -> &Tensor {
        &self.table
    }

    /// `[N]` i64: the position of each token.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// Tokens of the longest sequence, with what it continues.
    pub fn longest(&self) -> i64 {
        self.longest
    }

    /// Tokens.
    pub fn tokens(&self) -> i64 {
        self.positions.size()[0]
    }

    /// Pairs of a token and one that it sees, itself among them.
    pub fn pairs(&self) -> i64 {
        let before = |segment: &[i64; 3]| if segment[2] < 0 { 0 } else { self.segments[segment[2] as usize][1] };
        self.segments.iter().map(|segment| segment[1] * before(segment) + segment[1] * (segment[1] + 1) / 2).sum()
    }

    /// Places of the padded rectangles, where attention needs them.
    pub fn places(&self) -> i64 {
        let padded = self.padded();
        let of = |rectangle: &Rectangle| rectangle.rows * rectangle.length;
        of(&padded.roots) + padded.children.as_ref().map_or(0, |(_, own)| of(own))
    }

    /// The first token of each segment.
    pub fn first(&self, segment: usize) -> i64 {
        self.segments[segment][0]
    }

    /// The same as padded rectangles, for attention without a kernel for segments.
    pub(crate) fn padded(&self) -> &Padded {
        self.padded.get_or_init(|| Padded::new(&self.segments, self.positions.device()))
    }
}

/// Segments as rectangles: those that continue nothing, and those that do with what they continue.
#[derive(Debug)]
pub(crate) struct Padded {
    pub(crate) roots: Rectangle,
    /// The parents' tokens and then the children's, where there are children.
    pub(crate) children: Option<(Rectangle, Rectangle)>,
    /// `[N]` i64: the place of each token in the roots' rectangle, or behind it in the children's.
    pub(crate) back: Tensor,
}

/// Rows of tokens, padded on the right.
#[derive(Debug)]
pub(crate) struct Rectangle {
    pub(crate) rows: i64,
    pub(crate) length: i64,
    /// `[rows * length]` i64: the token at each place; padding repeats the row's first.
    pub(crate) tokens: Tensor,
    /// `[rows, length]` bool: whether a token stands there.
    pub(crate) real: Tensor,
}

impl Rectangle {
    fn new(rows: &[(i64, i64)], device: Device) -> Self {
        let length = rows.iter().map(|(_, length)| *length).max().unwrap_or(0);
        let places = rows
            .iter()
            .flat_map(|&(first, own)| (0..length).map(move |place| if place < own { first + place } else { first }));
        let real: Vec<bool> = rows.iter().flat_map(|&(_, own)| (0..length).map(move |place| place < own)).collect();
        let count = rows.len() as i64;
        Self {
            rows: count,
            length,
            tokens: Tensor::from_slice(&places.collect::<Vec<i64>>()).to_device(device),
            real: Tensor::from_slice(&real).view([count, length]).to_device(device),
        }
    }
}

impl Padded {
    fn new(segments: &[[i64; 3]], device: Device) -> Self {
        let span = |segment: &[i64; 3]| (segment[0], segment[1]);
        let (mut roots, mut parents, mut children) = (Vec::new(), Vec::new(), Vec::new());
        for segment in segments {
            match segment[2] {
                -1 => roots.push(span(segment)),
                parent => {
                    parents.push(span(&segments[parent as usize]));
                    children.push(span(segment));
                }
            }
        }
        let longest = |rows: &[(i64, i64)]| rows.iter().map(|(_, length)| *length).max().unwrap_or(0);
        let (wide, narrow) = (longest(&roots), longest(&children));
        let behind = roots.len() as i64 * wide;
        let (mut back, mut root, mut child) = (Vec::new(), 0, 0);
        for &[_, length, parent] in segments {
            let first = if parent < 0 { root * wide } else { behind + child * narrow };
            back.extend(first..first + length);
            if parent < 0 { root += 1 } else { child += 1 }
        }
        Self {
            roots: Rectangle::new(&roots, device),
            children: (!children.is_empty())
                .then(|| (Rectangle::new(&parents, device), Rectangle::new(&children, device))),
            back: Tensor::from_slice(&back).to_device(device),
        }
    }
}
