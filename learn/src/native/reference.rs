//! What [`super::gpu::attention`] is documented to compute, in libtorch's plainest operations: for tests on a processor.

use tch::{Kind, Tensor};

use super::gpu::Sequences;

/// See [`super::gpu::attention`]: a sequence at a time, a head at a time.
pub(super) fn attention(query: &Tensor, key: &Tensor, value: &Tensor, sequences: &Sequences<'_>) -> Tensor {
    let numbers = |tensor: &Tensor| -> Vec<i64> {
        assert_eq!(tensor.kind(), Kind::Int, "the operator takes i32");
        Vec::<i32>::try_from(tensor).expect("numbers").into_iter().map(i64::from).collect()
    };
    let (begins_q, begins_k) = (numbers(sequences.begins_q), numbers(sequences.begins_k));
    let used = sequences.used.map(numbers);
    let (heads, width, kind) = (query.size()[1], query.size()[2], query.kind());
    let group = heads / key.size()[1];
    assert_eq!((begins_q.len(), *begins_q.last().expect("an end")), (begins_k.len(), query.size()[0]));
    assert!(*begins_k.last().expect("an end") <= key.size()[0]);
    let of_sequence = |sequence: usize| {
        let (first_q, count) = (begins_q[sequence], begins_q[sequence + 1] - begins_q[sequence]);
        let (first_k, room) = (begins_k[sequence], begins_k[sequence + 1] - begins_k[sequence]);
        let seen = used.as_ref().map_or(room, |used| used[sequence]);
        assert!(count <= sequences.longest_q && room <= sequences.longest_k && (1..=room).contains(&seen));
        let of_head = |head: i64| {
            let of = |x: &Tensor, first: i64, count: i64, head: i64| x.narrow(0, first, count).select(1, head);
            // Scores and sums are fp32 at least, as the operator's are.
            let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
            let query = of(query, first_q, count, head).to_kind(wide);
            let [key, value] = [key, value].map(|x| of(x, first_k, seen, head / group).to_kind(wide));
            let mut scores = query.matmul(&key.tr()) / (width as f64).sqrt();
            if sequences.causal {
                let hidden = scores.ones_like().triu(seen - count + 1).to_kind(Kind::Bool);
                scores = scores.masked_fill(&hidden, f64::NEG_INFINITY);
            }
            scores.softmax(-1, wide).matmul(&value).to_kind(kind)
        };
        Tensor::stack(&(0..heads).map(of_head).collect::<Vec<_>>(), 1)
    };
    Tensor::cat(&(0..begins_q.len() - 1).map(of_sequence).collect::<Vec<_>>(), 0)
}
