//! Places for the vertices of a layered drawing: layers by the longest way, few crossings, edges as straight as can be.
//!
//! The steps are Sugiyama's. An edge that spans several layers bends at an item of its own in each layer between, so every link
//! joins neighbouring layers. It knows numbers only, no names and no pictures.

use std::collections::HashMap;

/// Sweeps that look for an order with fewer crossings.
const SWEEPS: usize = 24;

/// Sweeps that straighten edges.
const STRAIGHTENINGS: usize = 12;

/// What stands at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// A vertex.
    Vertex(usize),
    /// Where an edge passes a layer.
    Bend,
}

/// Items in layers, with links between neighbouring layers.
#[derive(Debug)]
pub(super) struct Layers {
    /// What the items are; vertices come first and have their own numbers.
    pub(super) items: Vec<Item>,
    /// Items from left to right.
    pub(super) rows: Vec<Vec<usize>>,
    /// The items of each edge, from the upper end to the lower; turned round where the edge leads up.
    pub(super) ways: Vec<Vec<usize>>,
    above: Vec<Vec<usize>>,
    below: Vec<Vec<usize>>,
}

impl Layers {
    /// The layers of a graph of `count` vertices. Edges that close a circle lead up.
    pub(super) fn of(count: usize, edges: &[(usize, usize)]) -> Self {
        let (rank, turned) = ranks(count, edges);
        let mut layers = Self {
            items: (0..count).map(Item::Vertex).collect(),
            rows: Vec::new(),
            ways: Vec::new(),
            above: Vec::new(),
            below: Vec::new(),
        };
        let mut layer_of = rank.clone();
        for (edge, &(from, to)) in edges.iter().enumerate() {
            let (upper, lower) = if turned[edge] { (to, from) } else { (from, to) };
            let mut way = vec![upper];
            for layer in rank[upper] + 1..rank[lower] {
                way.push(layers.items.len());
                layers.items.push(Item::Bend);
                layer_of.push(layer);
            }
            way.push(lower);
            layers.ways.push(way);
        }
        layers.above = vec![Vec::new(); layers.items.len()];
        layers.below = vec![Vec::new(); layers.items.len()];
        for way in &layers.ways {
            for link in way.windows(2) {
                layers.below[link[0]].push(link[1]);
                layers.above[link[1]].push(link[0]);
            }
        }
        layers.rows = vec![Vec::new(); layer_of.iter().max().map_or(0, |last| last + 1)];
        for item in layers.depth_first() {
            layers.rows[layer_of[item]].push(item);
        }
        layers.uncross();
        layers
    }

    /// Items in the order in which a walk along the links meets them: what belongs together stands together.
    fn depth_first(&self) -> Vec<usize> {
        let mut seen = vec![false; self.items.len()];
        let mut order = Vec::with_capacity(self.items.len());
        for start in (0..self.items.len()).filter(|item| self.above[*item].is_empty()) {
            let mut stack = vec![start];
            while let Some(item) = stack.pop() {
                if !std::mem::replace(&mut seen[item], true) {
                    order.push(item);
                    stack.extend(self.below[item].iter().rev());
                }
            }
        }
        order
    }

    /// Orders each layer by the mean place of its neighbours, downwards and upwards in turn, and keeps the best.
    fn uncross(&mut self) {
        let mut best = (self.crossings(), self.rows.clone());
        for sweep in 0..SWEEPS {
            if best.0 == 0 {
                break;
            }
            let down = sweep % 2 == 0;
            let count = self.rows.len();
            for step in 1..count {
                let (layer, fixed) = if down { (step, step - 1) } else { (count - 1 - step, count - step) };
                let place: HashMap<usize, usize> =
                    self.rows[fixed].iter().enumerate().map(|(place, item)| (*item, place)).collect();
                let links = if down { &self.above } else { &self.below };
                let mut keyed: Vec<(f64, usize)> = self.rows[layer]
                    .iter()
                    .enumerate()
                    .map(|(own, item)| {
                        let places = links[*item].iter().map(|neighbour| place[neighbour] as f64);
                        let mean = places.clone().sum::<f64>() / places.len() as f64;
                        (if mean.is_nan() { own as f64 } else { mean }, *item)
                    })
                    .collect();
                keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
                self.rows[layer] = keyed.into_iter().map(|(_, item)| item).collect();
            }
            let crossings = self.crossings();
            if crossings < best.0 {
                best = (crossings, self.rows.clone());
            }
        }
        self.rows = best.1;
    }

    /// How many pairs of links cross.
    pub(super) fn crossings(&self) -> usize {
        let pairs = self.rows.windows(2).map(|layers| {
            let place: HashMap<usize, usize> =
                layers[1].iter().enumerate().map(|(place, item)| (*item, place)).collect();
            let mut counts = vec![0; layers[1].len() + 1];
            let mut crossings = 0;
            let mut seen = 0;
            for item in &layers[0] {
                let mut ends: Vec<usize> = self.below[*item].iter().map(|below| place[below]).collect();
                ends.sort_unstable();
                // Earlier links that end further right, from a Fenwick tree of ends.
                for end in &ends {
                    let mut at = end + 1;
                    let mut left = 0;
                    while at > 0 {
                        left += counts[at];
                        at &= at - 1;
                    }
                    crossings += seen - left;
                }
                for end in ends {
                    let mut at = end + 1;
                    while at < counts.len() {
                        counts[at] += 1;
                        at += at & at.wrapping_neg();
                    }
                    seen += 1;
                }
            }
            crossings
        });
        pairs.sum()
    }

    /// The left edge of every item, where `width` gives the width of one and neighbours stand `gap` apart; the leftmost is at 0.
    pub(super) fn places(&self, width: impl Fn(usize) -> f64, gap: f64) -> Vec<f64> {
        let widths: Vec<f64> = (0..self.items.len()).map(width).collect();
        let mut left = vec![0.0; self.items.len()];
        for layer in &self.rows {
            let mut at = 0.0;
            for item in layer {
                left[*item] = at;
                at += widths[*item] + gap;
            }
        }
        for sweep in 0..STRAIGHTENINGS {
            let count = self.rows.len();
            let last = sweep + 2 >= STRAIGHTENINGS;
            for step in 0..count {
                let layer = if sweep % 2 == 0 { step } else { count - 1 - step };
                let items = &self.rows[layer];
                let wanted: Vec<(f64, f64)> = items
                    .iter()
                    .map(|item| {
                        let (above, below) = (&self.above[*item], &self.below[*item]);
                        let neighbours = match (sweep % 2 == 0, last) {
                            (_, true) => [above.as_slice(), below.as_slice()],
                            (true, false) => [above.as_slice(), &[]],
                            (false, false) => [below.as_slice(), &[]],
                        };
                        let (mut sum, mut weight) = (0.0, 0.0);
                        for neighbour in neighbours.into_iter().flatten() {
                            // Long edges are the ones that the eye wants straight.
                            let strength = match (self.items[*item], self.items[*neighbour]) {
                                (Item::Bend, Item::Bend) => 8.0,
                                (Item::Bend, _) | (_, Item::Bend) => 2.0,
                                _ => 1.0,
                            };
                            sum += strength * (left[*neighbour] + widths[*neighbour] / 2.0 - widths[*item] / 2.0);
                            weight += strength;
                        }
                        if weight > 0.0 { (sum / weight, weight) } else { (left[*item], 0.1) }
                    })
                    .collect();
                let apart: Vec<f64> = items.iter().map(|item| widths[*item] + gap).collect();
                for (item, place) in items.iter().zip(spread(&wanted, &apart)) {
                    left[*item] = place;
                }
            }
        }
        let leftmost = left.iter().copied().fold(f64::INFINITY, f64::min);
        left.iter().map(|place| place - leftmost).collect()
    }
}

/// The layer of each vertex, and which edges must be turned round so that all lead down.
fn ranks(count: usize, edges: &[(usize, usize)]) -> (Vec<usize>, Vec<bool>) {
    let mut leaving: Vec<Vec<usize>> = vec![Vec::new(); count];
    let mut entering: Vec<Vec<usize>> = vec![Vec::new(); count];
    for (edge, (from, to)) in edges.iter().enumerate() {
        leaving[*from].push(edge);
        entering[*to].push(edge);
    }
    let mut waiting: Vec<usize> = entering.iter().map(Vec::len).collect();
    let mut order = Vec::with_capacity(count);
    let mut placed = vec![false; count];
    let mut ready: Vec<usize> = (0..count).rev().filter(|vertex| waiting[*vertex] == 0).collect();
    while order.len() < count {
        // Where every vertex waits there is a circle: the first one goes ahead, and what it waits for leads up.
        let next = ready.pop().or_else(|| (0..count).find(|vertex| !placed[*vertex]));
        let Some(vertex) = next else { break };
        if std::mem::replace(&mut placed[vertex], true) {
            continue;
        }
        order.push(vertex);
        for edge in &leaving[vertex] {
            let to = edges[*edge].1;
            waiting[to] = waiting[to].saturating_sub(1);
            if waiting[to] == 0 && !placed[to] {
                ready.push(to);
            }
        }
    }
    let mut position = vec![0; count];
    for (place, vertex) in order.iter().enumerate() {
        position[*vertex] = place;
    }
    let turned: Vec<bool> = edges.iter().map(|(from, to)| position[*from] > position[*to]).collect();
    let mut rank = vec![0; count];
    let upper = |edge: usize| if turned[edge] { edges[edge].1 } else { edges[edge].0 };
    let lower = |edge: usize| if turned[edge] { edges[edge].0 } else { edges[edge].1 };
    let down = |vertex: usize| {
        let touching = leaving[vertex].iter().chain(&entering[vertex]);
        touching.copied().filter(move |edge| upper(*edge) == vertex)
    };
    for vertex in &order {
        for edge in down(*vertex) {
            rank[lower(edge)] = rank[lower(edge)].max(rank[*vertex] + 1);
        }
    }
    // What nothing enters stands right above what needs it.
    for vertex in order.iter().rev() {
        let is_top = !leaving[*vertex].iter().chain(&entering[*vertex]).any(|edge| lower(*edge) == *vertex);
        let nearest = down(*vertex).map(|edge| rank[lower(edge)]).min();
        if let Some(nearest) = nearest.filter(|_| is_top) {
            rank[*vertex] = nearest - 1;
        }
    }
    (rank, turned)
}

/// Places as near as can be to those wanted (by squares, weighted) with each at least `apart` from the next: isotonic
/// regression by pooling adjacent violators.
fn spread(wanted: &[(f64, f64)], apart: &[f64]) -> Vec<f64> {
    // In coordinates from which the distances are taken off, places must only never decrease.
    let mut offset = 0.0;
    let mut offsets = Vec::with_capacity(wanted.len());
    // Mean, weight and length of each block.
    let mut blocks: Vec<(f64, f64, usize)> = Vec::new();
    for ((place, weight), apart) in wanted.iter().zip(apart) {
        offsets.push(offset);
        blocks.push((place - offset, *weight, 1));
        offset += apart;
        while let [.., before, after] = blocks.as_slice()
            && before.0 > after.0
        {
            let weight = before.1 + after.1;
            let merged = ((before.0 * before.1 + after.0 * after.1) / weight, weight, before.2 + after.2);
            blocks.truncate(blocks.len() - 2);
            blocks.push(merged);
        }
    }
    let places = blocks.into_iter().flat_map(|(place, _, length)| std::iter::repeat_n(place, length));
    places.zip(offsets).map(|(place, offset)| place + offset).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_lead_down_and_roots_stand_above_what_needs_them() {
        let layers = Layers::of(5, &[(0, 1), (1, 2), (0, 2), (3, 2), (2, 4)]);
        assert_eq!(layers.rows.iter().map(Vec::len).collect::<Vec<_>>(), [1, 3, 1, 1], "0; 1, 3 and a bend; 2; 4");
        assert_eq!(layers.ways[2].len(), 3);
        assert_eq!(layers.crossings(), 0);
    }

    #[test]
    fn a_circle_is_drawn_with_one_edge_up() {
        let layers = Layers::of(3, &[(0, 1), (1, 2), (2, 0)]);
        assert_eq!(layers.rows.len(), 3);
        assert_eq!((layers.ways[2][0], layers.ways[2].len()), (0, 3));
    }

    #[test]
    fn crossings_are_counted_and_removed() {
        let layers = Layers::of(4, &[(0, 3), (1, 2)]);
        assert_eq!(layers.crossings(), 0);
        let full: Vec<(usize, usize)> = (0..3).flat_map(|from| (3..6).map(move |to| (from, to))).collect();
        assert_eq!(Layers::of(6, &full).crossings(), 9);
    }

    #[test]
    fn places_keep_apart_and_stand_in_the_middle() {
        let layers = Layers::of(4, &[(0, 1), (0, 2), (0, 3)]);
        let places = layers.places(|_| 10.0, 2.0);
        let mut lower: Vec<f64> = places[1..].to_vec();
        lower.sort_by(f64::total_cmp);
        assert_eq!(lower, [0.0, 12.0, 24.0]);
        assert!((places[0] - 12.0).abs() < 1e-6, "{places:?}");
        assert_eq!(spread(&[(5.0, 1.0), (5.0, 1.0)], &[2.0, 2.0]), [4.0, 6.0]);
    }
}
