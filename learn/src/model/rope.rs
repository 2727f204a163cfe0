//! Rotary positions (Su et al. 2021): the frequencies as a configuration scales them, and the tables that turn heads.
//!
//! Frequencies and angles are formed in f32 in the order in which `transformers` forms them, so that far positions agree
//! with it. A scaling that depends on the length of the sequence at hand is refused: a cached key would have another
//! rotation than the same key read anew.

use std::f32::consts::PI;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::model::ModelConfig;
use crate::model::plain::widened;

/// The rotary positions that a configuration asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are scaled to reach further positions.
    pub scaling: RopeScaling,
}

/// How frequencies are scaled to reach further positions than a model was first trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All by one factor (position interpolation, Chen et al. 2023).
    Linear {
        /// Every frequency is divided by it.
        factor: f64,
    },
    /// Low frequencies by a factor, high ones not at all, those between in part (Llama 3.1).
    Llama3 {
        /// The lowest frequencies are divided by it.
        factor: f64,
        /// Wavelengths above `original / low` count as low frequencies.
        low: f64,
        /// Wavelengths below `original / high` count as high frequencies.
        high: f64,
        /// Positions of the first training.
        original: f64,
    },
    /// NTK by parts with a scaled attention (YaRN, Peng et al. 2023).
    Yarn {
        /// The lowest frequencies are divided by it.
        factor: f64,
        /// Multiplied into the rotated queries and keys.
        attention: f64,
        /// Rotations over the original positions above which a frequency stays.
        fast: f64,
        /// Rotations over the original positions below which a frequency is fully scaled.
        slow: f64,
        /// Positions of the first training.
        original: f64,
        /// Whether the ramp between the two begins and ends at whole dimensions.
        truncate: bool,
    },
}

impl Default for Rope {
    fn default() -> Self {
        Self { theta: 10_000.0, scaling: RopeScaling::Default }
    }
}

impl Rope {
    /// Reads the rotary positions from the content of a `config.json`: `rope_theta` with `rope_scaling` (and `type` or
    /// `rope_type` in it), or the newer `rope_parameters`.
    pub fn parse(raw: &Value) -> Result<Self> {
        let tables = [("rope_scaling", &raw["rope_scaling"]), ("rope_parameters", &raw["rope_parameters"])];
        let mut tables = tables.into_iter().filter(|(_, table)| !table.is_null());
        let first = tables.next();
        if let (Some((one, first)), Some((other, second))) = (first, tables.next()) {
            ensure!(first == second, "`{one}` and `{other}` both stand in the configuration and differ");
        }
        let (name, table) = first.unwrap_or(("rope_parameters", &Value::Null));
        ensure!(table.is_null() || table.is_object(), "`{name}` is {table}, but must be a table");
        let read = Table { name, table };
        let theta = read.number("rope_theta")?.or(raw["rope_theta"].as_f64()).unwrap_or(Self::default().theta);
        ensure!(theta > 0.0, "`rope_theta` is {theta}, but must be positive");
        let partial = read.number("partial_rotary_factor")?.or(raw["partial_rotary_factor"].as_f64()).unwrap_or(1.0);
        ensure!(
            (partial - 1.0).abs() < 1e-12,
            "`partial_rotary_factor` is {partial}, but heads that turn in part are not implemented"
        );
        let nested = table.as_object().and_then(|table| table.iter().find(|(_, value)| value.is_object()));
        if let Some((layers, _)) = nested {
            bail!("`{name}` has a table of its own for layers of the type `{layers}`, which is not implemented");
        }
        let kind = [&table["rope_type"], &table["type"]].into_iter().find_map(Value::as_str).unwrap_or("default");
        // Where both tell, the field beside the table comes first, as in transformers.
        let positions = raw["max_position_embeddings"].as_f64();
        let original = || -> Result<f64> {
            let outside = raw["original_max_position_embeddings"].as_f64();
            let original = outside.or(read.number("original_max_position_embeddings")?).or(positions);
            let original = original.filter(|original| *original > 0.0);
            original.with_context(|| format!("`{name}` needs `original_max_position_embeddings`"))
        };
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: read.factor()? },
            "llama3" => {
                let (low, high) = (read.positive("low_freq_factor")?, read.positive("high_freq_factor")?);
                ensure!(low < high, "`low_freq_factor` {low} must be below `high_freq_factor` {high}");
                RopeScaling::Llama3 { factor: read.factor()?, low, high, original: original()? }
            }
            "yarn" => {
                let factor = read.factor()?;
                let truncate = table["truncate"].as_bool().unwrap_or(true);
                // 0 stands for the default, as it does in transformers.
                let or = |name: &str, default: f64| {
                    Ok::<_, anyhow::Error>(read.number(name)?.filter(|x| *x != 0.0).unwrap_or(default))
                };
                RopeScaling::Yarn {
                    factor,
                    attention: read.attention(factor)?,
                    fast: or("beta_fast", 32.0)?,
                    slow: or("beta_slow", 1.0)?,
                    original: original()?,
                    truncate,
                }
            }
            "dynamic" | "longrope" => bail!(
                "the rope type `{kind}` is not implemented: its frequencies change with the length of the sequence, so \
                 keys that a cache holds would not be those of a fresh pass; there are `default`, `linear`, `llama3` and `yarn`"
            ),
            other => {
                bail!("the rope type `{other}` is not implemented: there are `default`, `linear`, `llama3` and `yarn`")
            }
        };
        Ok(Self { theta, scaling })
    }

    /// Angles per position, one a pair of a head's `size` elements, and the factor by which a rotation also scales.
    pub fn frequencies(&self, size: i64) -> (Vec<f32>, f64) {
        let half = size / 2;
        // The base to the power of each pair's share of the head.
        let powers: Vec<f32> =
            (0..half).map(|index| (self.theta as f32).powf((2 * index) as f32 / size as f32)).collect();
        let plain = powers.iter().map(|power| 1.0 / power);
        match self.scaling {
            RopeScaling::Default => (plain.collect(), 1.0),
            RopeScaling::Linear { factor } => (plain.map(|frequency| frequency / factor as f32).collect(), 1.0),
            RopeScaling::Llama3 { factor, low, high, original } => {
                let factor = factor as f32;
                let scaled = plain.map(|frequency| {
                    let wavelength = 2.0 * PI / frequency;
                    if f64::from(wavelength) > original / low {
                        frequency / factor
                    } else if f64::from(wavelength) < original / high {
                        frequency
                    } else {
                        let smooth = (original as f32 / wavelength - low as f32) / (high - low) as f32;
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                });
                (scaled.collect(), 1.0)
            }
            RopeScaling::Yarn { factor, attention, fast, slow, original, truncate } => {
                // The pair that makes so many rotations over the original positions.
                let pair = |rotations: f64| {
                    let share = (original / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * self.theta.ln());
                    size as f64 * share
                };
                let (mut first, mut last) = (pair(fast), pair(slow));
                if truncate {
                    (first, last) = (first.floor(), last.ceil());
                }
                (first, last) = (first.max(0.0), last.min((size - 1) as f64));
                if (last - first).abs() < f64::EPSILON {
                    last += 0.001;
                }
                let scaled = powers.iter().zip(0..half).map(|(power, index)| {
                    let ramp = ((index as f32 - first as f32) / (last - first) as f32).clamp(0.0, 1.0);
                    let kept = 1.0 - ramp;
                    1.0 / (factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
                });
                (scaled.collect(), attention)
            }
        }
    }
}

/// A table of rotary settings with the name under which it stands.
struct Table<'a> {
    name: &'a str,
    table: &'a Value,
}

impl Table<'_> {
    fn number(&self, field: &str) -> Result<Option<f64>> {
        let value = &self.table[field];
        let number = value.as_f64().filter(|number| number.is_finite());
        ensure!(value.is_null() || number.is_some(), "`{field}` in `{}` is {value}, but must be a number", self.name);
        Ok(number)
    }

    fn positive(&self, field: &str) -> Result<f64> {
        let number = self.number(field)?.with_context(|| format!("`{}` needs `{field}`", self.name))?;
        ensure!(number > 0.0, "`{field}` in `{}` is {number}, but must be positive", self.name);
        Ok(number)
    }

    fn factor(&self) -> Result<f64> {
        self.positive("factor")
    }

    /// The factor of the attention that YaRN recommends, where the table names none.
    fn attention(&self, factor: f64) -> Result<f64> {
        if let Some(attention) = self.number("attention_factor")? {
            return Ok(attention);
        }
        let scale = |strength: f64| if factor <= 1.0 { 1.0 } else { 0.1 * strength * factor.ln() + 1.0 };
        let strength = |name: &str| Ok::<_, anyhow::Error>(self.number(name)?.filter(|strength| *strength != 0.0));
        Ok(match (strength("mscale")?, strength("mscale_all_dim")?) {
            (Some(one), Some(all)) => scale(one) / scale(all),
            _ => scale(1.0),
        })
    }
}

/// The rows of a query or key projection reordered so that those which turn together are neighbours.
///
/// Hugging Face turns element i of a head with element i + D/2. As neighbours they are one complex number, and turning is
/// one product. The order of a head's elements is the same for queries and keys, so no score depends on it.
pub(crate) fn paired(rows: &Tensor, heads: i64) -> Tensor {
    let size = rows.size();
    let half = size[0] / heads / 2;
    rows.view([heads, 2, half, -1]).transpose(1, 2).reshape(size.as_slice())
}

/// The rotations of all positions.
#[derive(Debug)]
pub(crate) struct Rotation {
    /// `scale * cos(angle)` and `scale * sin(angle)`, `[positions, D/2]` each.
    cosine: Tensor,
    sine: Tensor,
}

impl Rotation {
    pub(crate) fn new(config: &ModelConfig, kind: Kind, device: Device) -> Self {
        let (frequencies, scale) = config.rope.frequencies(config.head_dim);
        let positions = Tensor::arange(config.max_position_embeddings, (Kind::Float, Device::Cpu));
        let angles = positions.unsqueeze(1) * Tensor::from_slice(&frequencies).unsqueeze(0);
        let tables = [angles.cos() * scale, angles.sin() * scale];
        let [cosine, sine] = tables.map(|table| table.to_kind(kind).to_device(device));
        Self { cosine, sine }
    }

    /// `[positions, D/2]`, twice: cosines and sines.
    pub(crate) fn tables(&self) -> (&Tensor, &Tensor) {
        (&self.cosine, &self.sine)
    }

    /// Rotates heads `[N, heads, D]` by `positions` `[N]`, element i with element i + D/2, half precision in fp32. Positions occur many times, but no
    /// gradient reaches the tables, so the order of a sum never depends on that.
    pub(crate) fn apply(&self, heads: &Tensor, positions: &Tensor) -> Tensor {
        self.chosen(positions).apply(heads)
    }

    /// The rotations of `positions` `[N]`, for several uses.
    pub(crate) fn chosen(&self, positions: &Tensor) -> Chosen {
        let [cosine, sine] = [&self.cosine, &self.sine].map(|table| table.index_select(0, positions).unsqueeze(1));
        Chosen { cosine: Tensor::cat(&[&cosine, &cosine], 2), sine: Tensor::cat(&[&(-&sine), &sine], 2) }
    }

    /// Rotations for positions 0 to `length` of every row.
    pub(crate) fn first(&self, length: i64) -> Turn {
        self.turn(|table| table.narrow(0, 0, length), &[1, length, 1, -1])
    }

    /// Rotations for one position a row: `positions` is `[R]` i64.
    pub(crate) fn at(&self, positions: &Tensor) -> Turn {
        self.turn(|table| table.index_select(0, positions), &[positions.size()[0], 1, 1, -1])
    }

    /// Some positions as `scale * exp(i angle)`, for heads in the order of [`paired`]. They are few beside all: the table of
    /// all positions is not kept a second time.
    fn turn(&self, some: impl Fn(&Tensor) -> Tensor, size: &[i64]) -> Turn {
        Turn(Tensor::complex(&some(&self.cosine), &some(&self.sine)).view(size))
    }
}

/// The rotations of some positions, `[N, 1, D]` each: cosines, and sines that are negative in the first half.
#[derive(Debug)]
pub(crate) struct Chosen {
    cosine: Tensor,
    sine: Tensor,
}

impl Chosen {
    /// Rotates heads `[N, heads, D]`, each token by its position; half precision as wide as the tables are, rounded once.
    pub(crate) fn apply(&self, heads: &Tensor) -> Tensor {
        let half = heads.size()[2] / 2;
        // Few launches on a GPU: the halves are turned in one go.
        (heads * &self.cosine).addcmul(&heads.roll(half, 2), &self.sine).to_kind(heads.kind())
    }
}

/// A rotation that broadcasts over `[B, T, heads, D/2]` complex.
#[derive(Debug)]
pub(crate) struct Turn(Tensor);

impl Turn {
    /// Rotates `[B, T, heads, D]`, half precision in fp32.
    pub(crate) fn apply(&self, x: &Tensor) -> Tensor {
        let size = x.size();
        let pairs = widened(x).view([size[0], size[1], size[2], size[3] / 2, 2]).view_as_complex();
        (pairs * &self.0).view_as_real().view(size.as_slice()).to_kind(x.kind())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(raw: &Value) -> Rope {
        Rope::parse(raw).expect("rotary positions")
    }

    #[test]
    fn both_spellings_say_the_same() {
        let old =
            json!({"rope_theta": 5e5, "max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 4}});
        let new = json!({"max_position_embeddings": 64,
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}});
        assert_eq!(parse(&old), parse(&new));
        assert_eq!(parse(&old), Rope { theta: 5e5, scaling: RopeScaling::Linear { factor: 4.0 } });
        assert_eq!(parse(&json!({"rope_scaling": null})), Rope::default());
        let yarn = json!({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5}});
        let RopeScaling::Yarn { attention, original, fast, .. } = parse(&yarn).scaling else { panic!("not yarn") };
        let expected = (0.1 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0);
        assert!((attention - expected).abs() < 1e-12 && (original - 16.0).abs() + (fast - 32.0).abs() < 1e-12);
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_its_reason() {
        let refused = |table: Value| Rope::parse(&json!({"rope_scaling": table})).expect_err("refused").to_string();
        assert!(refused(json!({"type": "dynamic", "factor": 2.0})).contains("length of the sequence"));
        assert!(refused(json!({"rope_type": "longrope"})).contains("longrope"));
        assert!(refused(json!({"rope_type": "mrope"})).contains("there are `default`"));
        assert!(refused(json!({"type": "linear"})).contains("needs `factor`"));
        assert!(refused(json!({"type": "linear", "factor": "2"})).contains("must be a number"));
        assert!(refused(json!({"type": "yarn", "factor": 2.0})).contains("original_max_position_embeddings"));
        assert!(refused(json!({"full_attention": {"rope_type": "default"}})).contains("full_attention"));
        assert!(refused(json!({"partial_rotary_factor": 0.5})).contains("partial_rotary_factor"));
        let both =
            json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}});
        assert!(Rope::parse(&both).expect_err("two tables").to_string().contains("differ"));
    }

    /// By hand: the lowest frequencies of Llama 3.1 are divided by the factor, the highest stay.
    #[test]
    fn llama3_moves_low_frequencies_alone() {
        let raw = json!({"max_position_embeddings": 64, "rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3",
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}});
        let (scaled, attention) = parse(&raw).frequencies(8);
        let (plain, _) = Rope::default().frequencies(8);
        // Wavelengths are 6.3, 63, 630, 6300: below 32 / 4 = 8, and three above 32.
        assert_eq!(scaled[0].to_bits(), plain[0].to_bits());
        assert!((1..4).all(|pair| scaled[pair].to_bits() == (plain[pair] / 8.0).to_bits()));
        assert!((attention - 1.0).abs() < 1e-12);
    }
}
