//! Attention over rows as they lie in a batch, without padding, on a GPU in half precision: libtorch's own attention over
//! sequences of unequal lengths.
//!
//! A segment that continues another is a sequence of queries whose keys are the other's and then its own. What a sequence
//! computes depends on nothing that stands beside it.

use tch::Tensor;

use crate::model::Layout;
use crate::model::layout::Unequal;
use crate::model::rope::Rotation;
use crate::native::Heads;
use crate::native::gpu::{self, Sequences};

/// Whether [`attention`] takes projections like these.
pub(crate) fn takes(projected: &Tensor, heads: Heads) -> bool {
    gpu::attends(projected.device(), projected.kind(), heads.width)
}

/// See [`crate::native::attention`].
///
/// Keys of a prompt are selected once for each of its samples: the gradient of such a key is a sum, whose order is fixed in
/// the deterministic mode of `native::context`, as is that of the attention itself.
pub(crate) fn attention(projected: &Tensor, heads: Heads, layout: &Layout, rotation: &Rotation) -> Tensor {
    let Heads { queries, shared, width } = heads;
    let tokens = projected.size()[0];
    // Splits and not narrowings: the gradient of a split is put together at once.
    let split = |x: &Tensor, one: i64, other: i64| {
        let mut parts = x.split_with_sizes([one, other], 1).into_iter();
        parts.next().zip(parts.next()).expect("a split in two has two parts")
    };
    let all = projected.view([tokens, queries + 2 * shared, width]);
    let (turning, value) = split(&all, queries + shared, shared);
    let (query, key) = split(&rotation.apply(&turning, layout.positions()), queries, shared);
    let Unequal { begins_q, begins_k, longest_q, longest_k, keys } = layout.unequal();
    let (key, value) = match keys {
        Some(keys) => split(&Tensor::cat(&[key, value], 1).index_select(0, keys), shared, shared),
        None => (key, value),
    };
    let (longest_q, longest_k) = (*longest_q, *longest_k);
    let sequences = Sequences { begins_q, begins_k, longest_q, longest_k, causal: true, used: None };
    gpu::attention(&query, &key, &value, &sequences).reshape([tokens, queries * width])
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::model::layout::Segment;
    use crate::model::{Transformer, plain};
    use crate::native::{AsOnGpu, instead, without};
    use crate::sandbox;

    /// Prompts with no, one and several samples, and lengths of one token.
    fn tree() -> Layout {
        let segment = |(length, continues)| Segment { length, continues };
        let segments = [(5, false), (3, true), (1, true), (7, true), (4, false), (1, false), (2, true), (9, false)];
        Layout::new(&segments.map(segment), Device::Cpu)
    }

    /// The sum of waves over all hidden states, and the gradient of every weight.
    fn states_and_gradient(model: &Transformer, layout: &Layout) -> (Tensor, Tensor) {
        model.zero_gradients();
        let ids = Tensor::arange(layout.tokens(), (Kind::Int64, Device::Cpu)).square().remainder(13);
        let hidden = model.hidden(&ids, layout);
        let wave = Tensor::arange(hidden.numel() as i64, (hidden.kind(), Device::Cpu)).sin().view_as(&hidden);
        (&hidden * wave).sum(hidden.kind()).backward();
        (hidden.detach(), model.weights().gradient().copy())
    }

    #[test]
    fn attention_over_unequal_lengths_is_that_over_padded_rectangles() {
        for layout in [tree(), Layout::rows([4, 1, 9, 2], Device::Cpu), Layout::rows([1, 1], Device::Cpu)] {
            for model in sandbox::families() {
                for (model, bound) in [(model.double(), 1e-12), (model, 1e-5)] {
                    let (states, gradient) = instead(AsOnGpu::WithAttention, || states_and_gradient(&model, &layout));
                    let (plain, theirs) = without(|| states_and_gradient(&model, &layout));
                    let distances = (sandbox::relative(&states, &plain), sandbox::relative(&gradient, &theirs));
                    assert!(distances.0 < bound && distances.1 < bound, "{distances:?} of {:?}", model.config());
                }
            }
        }
    }

    #[test]
    fn neighbours_change_no_bit_and_get_no_gradient() {
        let heads = Heads { queries: 4, shared: 2, width: 4 };
        let model = sandbox::families().swap_remove(0);
        let of = |layout: &Layout, seed: f64| {
            let wave = (Tensor::arange(layout.tokens() * heads.projected(), (Kind::Float, Device::Cpu)) + seed).sin();
            wave.view([-1, heads.projected()])
        };
        // The second prompt of three with its sample, its neighbours' content and lengths of another kind.
        let segment = |(length, continues)| Segment { length, continues };
        let within = |first: usize, last: usize, seed: f64| {
            let segments = [(first, false), (4, false), (3, true), (last, false)].map(segment);
            let layout = Layout::new(&segments, Device::Cpu);
            let own = of(&Layout::rows([7], Device::Cpu), 5.0);
            let (first, all) = (first as i64, of(&layout, seed));
            all.narrow(0, first, 7).copy_(&own);
            let all = all.set_requires_grad(true);
            let mixed = instead(AsOnGpu::WithAttention, || attention(&all, heads, &layout, model.rotation()));
            let mixed = mixed.narrow(0, first, 7);
            mixed.square().sum(Kind::Float).backward();
            let gradient = all.grad();
            let outside = Tensor::cat(&[gradient.narrow(0, 0, first), gradient.narrow(0, first + 7, last as i64)], 0);
            assert_eq!(outside.abs().max().double_value(&[]).to_bits(), 0f64.to_bits());
            (mixed.detach(), gradient.narrow(0, first, 7).copy())
        };
        let one = within(6, 2, 0.0);
        assert_eq!(one, within(6, 2, 9.0), "the same placement beside others");
        assert_eq!(one, within(1, 8, 3.0), "and another placement");
    }

    #[test]
    fn rotations_in_one_go_are_those_of_halves() {
        for model in sandbox::families() {
            let width = model.config().head_dim;
            let heads = (Tensor::arange(7 * 3 * width, (Kind::Float, Device::Cpu)) * 0.7).cos().view([7, 3, width]);
            let positions = Tensor::from_slice(&[0i64, 5, 5, 1, 9, 2, 30]);
            let (cosine, sine) = model.rotation().tables();
            let [cosine, sine] = [cosine, sine].map(|table| table.index_select(0, &positions).unsqueeze(1));
            let (one, two) = (heads.narrow(2, 0, width / 2), heads.narrow(2, width / 2, width / 2));
            let halves = Tensor::cat(&[&one * &cosine - &two * &sine, two * cosine + one * sine], 2);
            assert!(sandbox::distance(&model.rotation().apply(&heads, &positions), &halves) < 1e-6);
        }
    }

    #[test]
    fn half_precision_goes_through_the_operator_as_it_is() {
        let (heads, layout) = (Heads { queries: 4, shared: 2, width: 8 }, tree());
        let (_folder, model) = sandbox::model(&serde_json::json!({"hidden_size": 32}));
        let made = |kind: Kind, path: AsOnGpu| {
            let rotation = Rotation::new(model.config(), kind, Device::Cpu);
            let wave = Tensor::arange(layout.tokens() * heads.projected(), (Kind::Float, Device::Cpu)).sin();
            let projected = wave.view([-1, heads.projected()]).to_kind(kind).set_requires_grad(true);
            let mixed = instead(path, || match path {
                AsOnGpu::WithAttention => attention(&projected, heads, &layout, &rotation),
                _ => plain::attention(&projected, heads, &layout, &rotation),
            });
            assert_eq!((mixed.kind(), mixed.size()), (kind, vec![layout.tokens(), 32]));
            mixed.square().sum(Kind::Float).backward();
            (mixed.detach(), projected.grad())
        };
        let (exact, ours) = (made(Kind::Float, AsOnGpu::No), made(Kind::BFloat16, AsOnGpu::WithAttention));
        let distances = (sandbox::relative(&ours.0, &exact.0), sandbox::relative(&ours.1, &exact.1));
        assert!(distances.0 < 1e-2 && distances.1 < 2e-2, "{distances:?}");
    }
}
