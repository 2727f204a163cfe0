//! What the parts of a reward are worth: how each bears on the total, and whether it tells solved from unsolved.

use serde::Serialize;

/// One reward among others, over the samples where it has a value.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Component {
    /// The mean of its values, unweighted; absent without a value.
    pub mean: Option<f64>,
    /// Their standard deviation (denominator n - 1).
    pub deviation: Option<f64>,
    /// `w Cov(r, R) / Var(R)` within groups; the shares of all components sum to 1. Absent where no total varies.
    pub variance_share: Option<f64>,
    /// The chance that a solved sample has a higher value than an unsolved one, ties counting half.
    pub auc: Option<f64>,
    /// Pearson's correlation with solved.
    pub correlation: Option<f64>,
}

/// Describes the component whose values are `values`, against `solved` of the same samples. The share is filled in apart.
pub fn describe(values: &[Option<f64>], solved: &[f64]) -> Component {
    let pairs: Vec<(f64, f64)> =
        values.iter().zip(solved).filter_map(|(value, solved)| Some(((*value)?, *solved))).collect();
    if pairs.is_empty() {
        return Component::default();
    }
    let (values, solved): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
    let (mean, deviation) = super::moments(&values);
    let positive: Vec<bool> = solved.iter().map(|solved| *solved >= 1.0).collect();
    Component {
        mean: Some(mean),
        deviation: (values.len() > 1).then_some(deviation),
        variance_share: None,
        auc: auc(&values, &positive),
        correlation: correlation(&values, &solved),
    }
}

/// The area under the ROC curve, by ranks (Mann and Whitney 1947); `None` where one class is empty.
pub fn auc(scores: &[f64], positive: &[bool]) -> Option<f64> {
    let of_positive: f64 = ranks(scores).iter().zip(positive).filter(|(_, yes)| **yes).map(|(rank, _)| rank).sum();
    let yes = positive.iter().filter(|yes| **yes).count() as f64;
    let no = positive.len() as f64 - yes;
    (yes > 0.0 && no > 0.0).then(|| (of_positive - yes * (yes + 1.0) / 2.0) / (yes * no))
}

/// Pearson's correlation; `None` where one side does not vary.
pub fn correlation(first: &[f64], second: &[f64]) -> Option<f64> {
    let (mean_first, mean_second) = (super::moments(first).0, super::moments(second).0);
    let (mut product, mut squares_first, mut squares_second) = (0.0, 0.0, 0.0);
    for (first, second) in first.iter().zip(second) {
        let (first, second) = (first - mean_first, second - mean_second);
        product += first * second;
        squares_first += first * first;
        squares_second += second * second;
    }
    let scale = (squares_first * squares_second).sqrt();
    (scale > 0.0).then(|| product / scale)
}

/// Spearman's rank correlation, ties at their mean rank; `None` where one side does not vary.
pub fn rank_correlation(first: &[f64], second: &[f64]) -> Option<f64> {
    correlation(&ranks(first), &ranks(second))
}

/// Ranks from 1, ties at their mean rank.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|first, second| values[*first].total_cmp(&values[*second]));
    let mut ranks = vec![0.0; values.len()];
    let mut before = 0.0;
    for tied in order.chunk_by(|first, second| values[*first].total_cmp(&values[*second]).is_eq()) {
        let rank = before + f64::midpoint(tied.len() as f64, 1.0);
        for at in tied {
            ranks[*at] = rank;
        }
        before += tied.len() as f64;
    }
    ranks
}

/// The share of each component in the variance of the total within groups; `None` where no total varies.
///
/// `contributions` is `[sample][component]`, weight times value, 0 where there is none; `groups` holds the samples of each
/// group that have a total.
pub fn variance_shares(contributions: &[Vec<f64>], groups: &[Vec<usize>]) -> Option<Vec<f64>> {
    let count = contributions.first()?.len();
    let (mut covariances, mut variance) = (vec![0.0; count], 0.0);
    for group in groups.iter().filter(|group| !group.is_empty()) {
        let n = group.len() as f64;
        let total = |at: usize| contributions[at].iter().sum::<f64>();
        let mean_total = group.iter().map(|at| total(*at)).sum::<f64>() / n;
        for (component, covariance) in covariances.iter_mut().enumerate() {
            let mean = group.iter().map(|at| contributions[*at][component]).sum::<f64>() / n;
            *covariance +=
                group.iter().map(|at| (contributions[*at][component] - mean) * (total(*at) - mean_total)).sum::<f64>();
        }
        variance += group.iter().map(|at| (total(*at) - mean_total).powi(2)).sum::<f64>();
    }
    (variance > 0.0).then(|| covariances.into_iter().map(|covariance| covariance / variance).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_area_counts_pairs_and_ties_half() {
        let area = auc(&[1.0, 2.0, 2.0, 3.0], &[false, false, true, true]).unwrap();
        // Of four pairs three are right and one is a tie.
        assert!((area - 3.5 / 4.0).abs() < 1e-12);
        assert_eq!(auc(&[1.0, 2.0], &[true, true]), None);
        assert!((auc(&[5.0; 6], &[true, false, true, false, true, false]).unwrap() - 0.5).abs() < 1e-12);
    }

    #[test]
    fn shares_sum_to_one_and_may_be_negative() {
        let contributions = vec![vec![1.0, -0.5], vec![0.0, 0.0], vec![2.0, -0.5], vec![1.0, 0.1]];
        let shares = variance_shares(&contributions, &[vec![0, 1], vec![2, 3]]).unwrap();
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        // By hand: totals 0.5, 0 and 1.5, 1.1; Var sum 0.125 + 0.08; first: 0.25 + 0.2.
        assert!((shares[0] - 0.45 / 0.205).abs() < 1e-12 && shares[1] < 0.0, "{shares:?}");
        assert_eq!(variance_shares(&contributions, &[vec![0], vec![2]]), None);
    }

    #[test]
    fn ranks_do_not_see_the_scale() {
        let agreement = rank_correlation(&[1.0, 2.0, 3.0, 4.0], &[1.0, 10.0, 100.0, 1000.0]).unwrap();
        assert!((agreement - 1.0).abs() < 1e-12);
        assert_eq!(rank_correlation(&[1.0, 1.0], &[1.0, 2.0]), None);
        let described = describe(&[Some(1.0), None, Some(3.0)], &[0.0, 1.0, 1.0]);
        assert_eq!((described.mean, described.auc), (Some(2.0), Some(1.0)));
        assert_eq!(describe(&[None], &[1.0]), Component::default());
    }
}
