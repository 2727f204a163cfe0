//! What a sample can show before it is drawn.

use super::normal_quantile;

/// The smallest mean difference of `n` independent pairs that a two-sided test at `level` finds with chance `power`,
/// where the differences have the standard deviation `deviation`: `(z_level + z_power) deviation / sqrt(n)`.
///
/// Cohen (1988), section 2.4, in the normal limit.
pub fn smallest_detectable(deviation: f64, n: usize, level: f64, power: f64) -> f64 {
    (normal_quantile(level) + normal_quantile(2.0 * power - 1.0)) * deviation / (n as f64).sqrt()
}

/// The same for the difference of two shares on the same `n` instances of which the share `discordant` comes out
/// differently: the variance of a pair is then `discordant - d^2`, solved for d.
///
/// The variance is Connor's (1987), "Sample size for testing differences in proportions for the paired-sample design",
/// used under both hypotheses.
pub fn smallest_detectable_share(discordant: f64, n: usize, level: f64, power: f64) -> f64 {
    let z = normal_quantile(level) + normal_quantile(2.0 * power - 1.0);
    z * (discordant / (n as f64 + z * z)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_numbers_come_out() {
        // (1.959964 + 0.841621) / sqrt(100)
        assert!((smallest_detectable(1.0, 100, 0.95, 0.8) - 0.280_158_5).abs() < 1e-6);
        let share = smallest_detectable_share(0.2, 1000, 0.95, 0.8);
        let again = smallest_detectable((0.2 - share * share).sqrt(), 1000, 0.95, 0.8);
        assert!((share - again).abs() < 1e-12, "the closed form solves the equation");
    }
}
