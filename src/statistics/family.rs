//! The correction for a family of tests.

/// Holm's step-down adjustment: p values that may each be read at the level of the whole family.
///
/// Holm (1979), "A simple sequentially rejective multiple test procedure": the i-th smallest of m (from 0) becomes
/// the greatest of `(m - j) p_j` for j up to i, at most 1.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut adjusted = vec![0.0; p.len()];
    let mut greatest = 0.0f64;
    for (rank, &place) in order.iter().enumerate() {
        greatest = greatest.max((p.len() - rank) as f64 * p[place]).min(1.0);
        adjusted[place] = greatest;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_textbook_example_comes_out() {
        // statsmodels.stats.multitest.multipletests([.01, .04, .03, .005], method="holm")
        let found = holm(&[0.01, 0.04, 0.03, 0.005]);
        for (found, wanted) in found.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            assert!((found - wanted).abs() < 1e-12, "{found} is not {wanted}");
        }
        assert!(holm(&[]).is_empty());
        assert!(holm(&[0.9, 0.8]).iter().all(|&p| p <= 1.0));
    }
}
