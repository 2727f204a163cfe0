//! What this machine has to give: cores, GPUs, memory, and the named slots that its user has declared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::pipeline::exec::device::Gpus;

/// The whole of a machine, of which a run hands out shares.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// Cores, as affinity and control groups allow.
    pub cores: usize,
    /// Its GPUs.
    pub gpus: Gpus,
    /// Bytes of memory: what it has in all, or what its control group allows where that is less. Not what is free at the moment,
    /// so that a run does not depend on when it was started.
    pub memory: u64,
    /// How much there is of each named slot; of one that is not named there is 1.
    pub slots: BTreeMap<String, usize>,
}

impl Machine {
    /// This machine, with the named slots that its user says it has.
    pub fn detect(slots: BTreeMap<String, usize>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { cores, gpus: Gpus::detect(), memory: memory(Path::new("/")), slots }
    }
}

/// The bytes of memory of the machine whose files lie below `root`; no limit where nothing tells.
fn memory(root: &Path) -> u64 {
    let read = |path: PathBuf| std::fs::read_to_string(path).ok();
    let number = |path: PathBuf| read(path)?.trim().parse::<u64>().ok();
    let total = read(root.join("proc/meminfo")).and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.saturating_mul(1024))
    });
    let mut least = total.unwrap_or(u64::MAX);
    // `0::/path` is the group of version 2, `N:...,memory:/path` that of version 1. Every group above it limits it too.
    for line in read(root.join("proc/self/cgroup")).unwrap_or_default().lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (mount, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            list if list.split(',').any(|name| name == "memory") => ("sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        for folder in Path::new(group.trim_start_matches('/')).ancestors() {
            least = least.min(number(root.join(mount).join(folder).join(file)).unwrap_or(u64::MAX));
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_the_least_of_what_the_machine_has_and_its_groups_allow() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(memory(root.path()), u64::MAX);
        write("proc/meminfo", "MemFree: 1 kB\nMemTotal:       2048 kB\n");
        assert_eq!(memory(root.path()), 2048 << 10);
        write("proc/self/cgroup", "0::/user/job\n");
        write("sys/fs/cgroup/user/job/memory.max", "max\n");
        assert_eq!(memory(root.path()), 2048 << 10);
        write("sys/fs/cgroup/user/memory.max", "1000\n");
        assert_eq!(memory(root.path()), 1000, "the group above counts");
        write("proc/self/cgroup", "3:cpu:/a\n4:memory,rdma:/b\n");
        write("sys/fs/cgroup/memory/b/memory.limit_in_bytes", "77\n");
        assert_eq!(memory(root.path()), 77);
        assert!(Machine::detect(BTreeMap::new()).memory > 1 << 20);
    }
}
