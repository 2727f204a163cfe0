//! The steps of the forward pass in libtorch's own operations, for devices without kernels of ours. The kernels are tested
//! against these.

use tch::{Device, Kind, Tensor};

use crate::model::layout::{Layout, Rectangle};
use crate::model::rope::Rotation;
use crate::native::Heads;

/// `x` in fp32 where it is of half precision, else as it is.
pub(crate) fn widened(x: &Tensor) -> Tensor {
    x.to_kind(if x.kind() == Kind::BFloat16 { Kind::Float } else { x.kind() })
}

/// `x / sqrt(mean(x^2) + epsilon)` over the last dimension (RMSNorm without its weight, Zhang and Sennrich 2019).
pub(crate) fn normalise(x: &Tensor, epsilon: f64) -> Tensor {
    // The vector norm reads x once and keeps no squares for the backward pass.
    let width = x.size()[x.dim() - 1] as f64;
    let norm = x.norm_scalaropt_dim(2, [-1i64].as_slice(), true);
    x * (norm.square() / width + epsilon).rsqrt()
}

/// [`normalise`] times `weight`; on a GPU in one launch of libtorch's, with one more for the gradient of each.
pub(crate) fn norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Tensor {
    if x.device() == Device::Cpu {
        return normalise(x, epsilon) * weight;
    }
    x.rms_norm(weight.size(), Some(weight), epsilon)
}

/// See [`crate::native::swiglu`].
pub(crate) fn swiglu(gate_up: &Tensor) -> Tensor {
    let mut parts = gate_up.chunk(2, -1).into_iter();
    let (gate, up) = parts.next().zip(parts.next()).expect("a chunking in two has two parts");
    gate.silu() * up
}

/// See [`crate::native::attention`].
///
/// Tokens are selected several times where a prompt has several samples and where rows are padded: the gradient of such a
/// token is a sum, whose order is fixed on every device only in the deterministic mode of `native::context`.
pub(crate) fn attention(projected: &Tensor, heads: Heads, layout: &Layout, rotation: &Rotation) -> Tensor {
    let Heads { queries, shared, width } = heads;
    let tokens = projected.size()[0];
    let all = projected.view([tokens, queries + 2 * shared, width]);
    let turned = rotation.apply(&all.narrow(1, 0, queries + shared), layout.positions());
    let (query, key) = (turned.narrow(1, 0, queries), turned.narrow(1, queries, shared));
    let value = all.narrow(1, queries + shared, shared);
    let padded = layout.padded();
    // [rows, heads, length, D].
    let lay = |x: &Tensor, rectangle: &Rectangle| {
        let size = x.size();
        x.index_select(0, &rectangle.tokens).view([rectangle.rows, rectangle.length, size[1], size[2]]).transpose(1, 2)
    };
    let repeat = |x: Tensor| repeat_heads(&x, queries);
    let flat = |x: Tensor| x.transpose(1, 2).reshape([-1, queries * width]);
    let roots = {
        let [query, key, value] = [&query, &key, &value].map(|x| lay(x, &padded.roots));
        flat(attend(&query, &repeat(key), &repeat(value), None))
    };
    let Some((parents, own)) = &padded.children else { return roots.index_select(0, &padded.back) };
    let both = |x: &Tensor| repeat(Tensor::cat(&[lay(x, parents), lay(x, own)], 2));
    let mask = visible(parents, own, projected.kind());
    let children = flat(attend(&lay(&query, own), &both(&key), &both(&value), Some(&mask)));
    Tensor::cat(&[roots, children], 0).index_select(0, &padded.back)
}

/// What each token of the children may see of its parent and of its own segment, `[rows, 1, length, parent + length]`: 0 or
/// minus infinity.
fn visible(parents: &Rectangle, own: &Rectangle, kind: Kind) -> Tensor {
    let causal = Tensor::ones([own.length, own.length], (Kind::Bool, own.real.device())).tril(0);
    let before = parents.real.view([own.rows, 1, 1, parents.length]);
    let before = before.expand([own.rows, 1, own.length, parents.length], false);
    let causal = causal.view([1, 1, own.length, own.length]).expand([own.rows, 1, own.length, own.length], false);
    let seen = Tensor::cat(&[before, causal], 3);
    seen.zeros_like().to_kind(kind).masked_fill(&seen.logical_not(), f64::NEG_INFINITY)
}

/// Attention over `[B, heads, T, D]`: causal without a mask.
pub(crate) fn attend(query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>) -> Tensor {
    Tensor::scaled_dot_product_attention(query, key, value, mask, 0.0, mask.is_none(), None, false)
}

/// Each head of `[B, shared, T, D]` as often as makes `heads` of them.
pub(crate) fn repeat_heads(shared: &Tensor, heads: i64) -> Tensor {
    let size = shared.size();
    if size[1] == heads {
        return shared.shallow_clone();
    }
    let times = heads / size[1];
    shared.unsqueeze(2).expand([size[0], size[1], times, size[2], size[3]], false).flatten(1, 2)
}
