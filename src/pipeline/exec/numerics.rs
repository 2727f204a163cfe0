//! With what an attempt computes: build, processor, threads, device. It enters no key and is kept beside the result.

use std::collections::BTreeMap;
use std::sync::OnceLock;

/// What the numbers of an attempt are computed with, beside what the process that runs it says of itself.
pub(super) fn numerics(
    mut numerics: BTreeMap<String, String>,
    device: &str,
    threads: usize,
) -> BTreeMap<String, String> {
    numerics.insert("pipe".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
    numerics.insert("cpu".to_owned(), cpu_features().to_owned());
    numerics.insert("threads".to_owned(), threads.to_string());
    numerics.insert("device".to_owned(), device.to_owned());
    numerics
}

/// The architecture with those features by which numerical libraries choose their code.
fn cpu_features() -> &'static str {
    static FEATURES: OnceLock<String> = OnceLock::new();
    FEATURES.get_or_init(|| {
        let mut features = vec![std::env::consts::ARCH];
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! detect {
                ($($name:tt)*) => { $(if std::is_x86_feature_detected!($name) { features.push($name); })* };
            }
            detect!("sse4.2" "avx" "f16c" "fma" "avx2" "avx512f" "avx512bw" "avx512vl" "avx512vnni" "avx512bf16");
        }
        features.join("+")
    })
}
