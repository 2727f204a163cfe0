//! Which GPUs there are, and what a stage's `run` table asks for on this machine.
//!
//! It links no GPU library: the files of the driver tell how many there are, and the worker asks libtorch again.

use crate::pipeline::exec::slots::{Gpu, Need};
use crate::pipeline::stage::{Place, RunOptions};

/// The GPUs of this machine, each as `CUDA_VISIBLE_DEVICES` names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gpus {
    names: Vec<String>,
    /// `CUDA_VISIBLE_DEVICES` as this process found it.
    listed: Option<String>,
}

impl Gpus {
    /// Those that the driver's files and `CUDA_VISIBLE_DEVICES` show.
    pub fn detect() -> Self {
        let entries = std::fs::read_dir("/dev").into_iter().flatten().flatten();
        let files = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>();
        Self::of(&files, std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref())
    }

    /// Those of these files in `/dev`, with `CUDA_VISIBLE_DEVICES` as it was found.
    pub(super) fn of(files: &[String], visible: Option<&str>) -> Self {
        let numbers = files.iter().filter_map(|file| file.strip_prefix("nvidia")?.parse::<usize>().ok());
        let mut present: Vec<usize> = numbers.collect();
        present.sort_unstable();
        let names = match visible {
            _ if present.is_empty() => Vec::new(),
            Some(list) => {
                let entries = list.split(',').map(str::trim);
                // As in CUDA, the first entry that names nothing ends the list.
                entries.take_while(|entry| !entry.is_empty() && *entry != "-1").map(str::to_owned).collect()
            }
            None => (0..present.len()).map(|index| index.to_string()).collect(),
        };
        Self { names, listed: visible.map(str::to_owned) }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.names.len()
    }

    /// What `CUDA_VISIBLE_DEVICES` must be for a stage that was given the GPU `granted`, or none; `None` is whatever the
    /// stage's programs find.
    pub fn visible_to(&self, place: Place, run: &RunOptions, granted: Option<usize>) -> Option<String> {
        match granted.and_then(|index| self.names.get(index)) {
            Some(name) => Some(name.clone()),
            None if place == Place::InProcess && run.device == "auto" => self.listed.clone(),
            None => Some(String::new()),
        }
    }
}

/// What a stage takes on a machine with `cores` and `gpus`. An error says why it cannot run here.
pub fn need(place: Place, run: &RunOptions, cores: usize, gpus: usize) -> Result<Need, String> {
    let gpu = match (place, run.device.as_str()) {
        // Few light stages use a GPU, and one that was given to each would run them one after the other.
        (Place::InProcess, "auto") | (_, "cpu") => Gpu::None,
        (_, "auto") if gpus == 0 => Gpu::None,
        (_, "auto") => Gpu::Any,
        (_, "cuda") if gpus > 0 => Gpu::Any,
        (_, device) => {
            let index = match device.strip_prefix("cuda") {
                Some("") => Some(0),
                Some(rest) => rest.strip_prefix(':').and_then(|index| index.parse().ok()),
                None => None,
            };
            match index {
                Some(index) if index < gpus => Gpu::Index(index),
                Some(_) => {
                    return Err(format!(
                        "the device `{device}` was asked for, and this machine shows {}; \
                         set `run.device` to `cpu` or `auto`",
                        match gpus {
                            0 => "no GPU".to_owned(),
                            1 => "one GPU (`cuda:0`)".to_owned(),
                            _ => format!("{gpus} GPUs (`cuda:0` to `cuda:{}`)", gpus - 1),
                        }
                    ));
                }
                None => return Err(format!("unknown device `{device}`; expected `auto`, `cpu`, `cuda` or `cuda:N`")),
            }
        }
    };
    let cpus = match (run.cpus, place, gpu) {
        (0, Place::InProcess, _) => 1,
        (0, Place::Worker, Gpu::None) => cores,
        // Stages on other GPUs need cores too.
        (0, Place::Worker, _) => cores / gpus.max(1),
        (cpus, ..) => cpus,
    };
    Ok(Need { cpus: cpus.max(1), gpu, ..Need::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn gpus_are_counted_by_their_files_and_hidden_by_the_environment() {
        let two = files(&["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"]);
        assert_eq!(Gpus::of(&two, None).names, ["0", "1"]);
        assert_eq!(Gpus::of(&two, Some("1")).names, ["1"]);
        assert_eq!(Gpus::of(&two, Some("")).count(), 0);
        assert_eq!(Gpus::of(&files(&["null"]), Some("0")).count(), 0);
    }

    #[test]
    fn a_stage_sees_the_gpu_that_it_holds() {
        let gpus = Gpus::of(&files(&["nvidia0", "nvidia1"]), Some("1,0"));
        let sees = |gpus: &Gpus, place, device: &str, granted| {
            gpus.visible_to(place, &RunOptions { device: device.to_owned(), ..RunOptions::default() }, granted)
        };
        assert_eq!(sees(&gpus, Place::Worker, "auto", Some(0)).as_deref(), Some("1"));
        assert_eq!(sees(&gpus, Place::Worker, "cpu", None).as_deref(), Some(""));
        assert_eq!(sees(&gpus, Place::InProcess, "cuda:1", Some(1)).as_deref(), Some("0"));
        assert_eq!(sees(&gpus, Place::InProcess, "cpu", None).as_deref(), Some(""));
        assert_eq!(sees(&gpus, Place::InProcess, "auto", None).as_deref(), Some("1,0"));
        assert_eq!(sees(&Gpus::of(&files(&["nvidia0"]), None), Place::InProcess, "auto", None), None);
    }

    #[test]
    fn a_stage_takes_what_its_table_says_and_a_missing_gpu_is_an_error() {
        let run = |cpus, device: &str| RunOptions { cpus, device: device.to_owned(), ..RunOptions::default() };
        let taken = |place, run: &RunOptions, gpus| need(place, run, 8, gpus).map(|need| (need.cpus, need.gpu));
        assert_eq!(taken(Place::InProcess, &run(0, "auto"), 1), Ok((1, Gpu::None)));
        assert_eq!(taken(Place::InProcess, &run(0, "cuda"), 1), Ok((1, Gpu::Any)));
        assert!(taken(Place::InProcess, &run(0, "cuda:9"), 0).is_err());
        assert_eq!(taken(Place::Worker, &run(0, "auto"), 0), Ok((8, Gpu::None)));
        assert_eq!(taken(Place::Worker, &run(0, "auto"), 4), Ok((2, Gpu::Any)));
        assert_eq!(taken(Place::Worker, &run(3, "cuda:1"), 4), Ok((3, Gpu::Index(1))));
        assert_eq!(taken(Place::Worker, &run(3, "cpu"), 4), Ok((3, Gpu::None)));
        let missing = taken(Place::Worker, &run(0, "cuda:0"), 0).unwrap_err();
        assert!(missing.contains("`cuda:0`") && missing.contains("no GPU"), "{missing}");
        assert!(taken(Place::Worker, &run(0, "cuda"), 0).is_err());
        assert!(taken(Place::Worker, &run(0, "cuda:4"), 4).unwrap_err().contains("4 GPUs"));
        assert!(taken(Place::Worker, &run(0, "gpu"), 4).unwrap_err().contains("unknown device"));
    }
}
