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
    unequal: OnceCell<Unequal>,
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
        Self { segments: rows, table, positions, longest, padded: OnceCell::new(), unequal: OnceCell::new() }
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

    /// Places that attention has computed: tokens, and padding where it went over padded rectangles.
    pub fn places(&self) -> i64 {
        let of = |rectangle: &Rectangle| rectangle.rows * rectangle.length;
        let padded = |padded: &Padded| of(&padded.roots) + padded.children.as_ref().map_or(0, |(_, own)| of(own));
        self.padded.get().map_or(self.tokens(), padded)
    }

    /// The first token of each segment.
    pub fn first(&self, segment: usize) -> i64 {
        self.segments[segment][0]
    }

    /// The same as sequences of queries and of keys, for attention over unequal lengths.
    pub(crate) fn unequal(&self) -> &Unequal {
        self.unequal.get_or_init(|| Unequal::new(&self.segments, self.positions.device()))
    }

    /// The same as padded rectangles, for attention without a kernel for segments.
    pub(crate) fn padded(&self) -> &Padded {
        self.padded.get_or_init(|| Padded::new(&self.segments, self.positions.device()))
    }
}

/// Segments as queries over their parent's keys and their own, none of them padded: the last query of each stands at its last
/// key.
#[derive(Debug)]
pub(crate) struct Unequal {
    /// `[S + 1]` i32: where each segment begins among the queries, and their end.
    pub(crate) begins_q: Tensor,
    /// `[S + 1]` i32: the same among the keys.
    pub(crate) begins_k: Tensor,
    /// Tokens of the longest segment.
    pub(crate) longest_q: i64,
    /// Keys of the one that has most.
    pub(crate) longest_k: i64,
    /// `[K]` i64: the token of each key; `None` where every segment has its own alone, so that keys stand as tokens do.
    pub(crate) keys: Option<Tensor>,
}

impl Unequal {
    fn new(segments: &[[i64; 3]], device: Device) -> Self {
        let (mut queries, mut keys) = (vec![0i32], Vec::new());
        let (mut begins_k, mut longest_q, mut longest_k) = (vec![0i32], 0, 0);
        for &[first, length, parent] in segments {
            let begun = keys.len();
            if parent >= 0 {
                let [first, length, _] = segments[parent as usize];
                keys.extend(first..first + length);
            }
            keys.extend(first..first + length);
            queries.push((first + length) as i32);
            // Of all keys of a batch there are fewer than two thousand million: they would not fit anywhere.
            begins_k.push(keys.len() as i32);
            (longest_q, longest_k) = (longest_q.max(length), longest_k.max((keys.len() - begun) as i64));
        }
        let tree = segments.iter().any(|segment| segment[2] >= 0);
        Self {
            begins_q: Tensor::from_slice(&queries).to_device(device),
            begins_k: Tensor::from_slice(&begins_k).to_device(device),
            longest_q,
            longest_k,
            keys: tree.then(|| Tensor::from_slice(&keys).to_device(device)),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor.to_kind(tch::Kind::Int64)).expect("numbers")
    }

    /// By hand: a prompt of two tokens with two samples, one that stands alone, one with a sample.
    #[test]
    fn samples_are_queries_over_their_prompts_keys_and_their_own() {
        let segment = |(length, continues)| Segment { length, continues };
        let tree = [(2, false), (1, true), (3, true), (2, false), (1, false), (2, true)].map(segment);
        let layout = Layout::new(&tree, Device::Cpu);
        let Unequal { begins_q, begins_k, longest_q, longest_k, keys } = layout.unequal();
        assert_eq!(numbers(begins_q), [0, 2, 3, 6, 8, 9, 11]);
        assert_eq!(numbers(begins_k), [0, 2, 5, 10, 12, 13, 16]);
        assert_eq!((*longest_q, *longest_k), (3, 5));
        let keys = numbers(keys.as_ref().expect("a tree"));
        assert_eq!(keys, [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 8, 9, 10]);
        let rows = Layout::rows([3, 1], Device::Cpu);
        assert_eq!(
            (numbers(&rows.unequal().begins_q), numbers(&rows.unequal().begins_k)),
            (vec![0, 3, 4], vec![0, 3, 4])
        );
        assert!(rows.unequal().keys.is_none());
    }
}
