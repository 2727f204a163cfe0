//! Which of the user's files a bundle holds and how they lie to each other, proven by reading them in another place.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{At as _, BundleError};
use crate::pipeline::plan::Plan;
use crate::pipeline::spec;
use crate::pipeline::stage::Kind;
use crate::pipeline::store::Store;

/// The user's files below the folder that holds them all.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The experiments' files, relative to the root, with `/`.
    pub(super) experiments: Vec<String>,
    /// Every file by its path relative to the root, with `/`.
    pub(super) files: BTreeMap<String, PathBuf>,
}

impl Layout {
    /// The layout of the files behind `plan`, which was made of the experiments in `files`.
    ///
    /// It is proven: the TOML files are copied into another place, the others are linked there, and the experiments must read
    /// there as they read here, from nothing but what was put there.
    pub fn new(files: &[PathBuf], plan: &Plan, store: &Store, kinds: &'static [Kind]) -> Result<Self, BundleError> {
        let sources = spec::sources(files);
        let named: BTreeSet<PathBuf> =
            plan.nodes.iter().flat_map(|node| node.files.keys()).map(PathBuf::from).collect();
        let root = common_root(sources.iter().chain(&named));
        let experiments = files.iter().map(|file| {
            let file = spec::absolute_path(file).at("find", file)?;
            relative(&file, &root)
        });
        let experiments = experiments.collect::<Result<Vec<_>, _>>()?;
        let elsewhere = tempfile::tempdir().at("make a folder in", &std::env::temp_dir())?;
        let there = elsewhere.path().canonicalize().at("find", elsewhere.path())?;
        for source in &sources {
            let path = there.join(relative(source, &root)?);
            make_folder_of(&path)?;
            std::fs::copy(source, &path).at("copy", source)?;
        }
        for file in named.iter().filter(|file| !sources.contains(*file)) {
            let path = there.join(relative(file, &root)?);
            make_folder_of(&path)?;
            // One that lies in a folder which was linked is there already.
            if std::fs::symlink_metadata(&path).is_err() {
                std::os::unix::fs::symlink(file, &path).at("link", file)?;
            }
        }
        prove(&experiments, &there, &named, plan, store, kinds)?;
        let mut all = BTreeMap::new();
        for file in sources.iter().chain(&named) {
            gather(file, &root, &mut all)?;
        }
        Ok(Self { experiments, files: all })
    }
}

/// Holds that the files in `there` say what the plan says, and rest on nothing outside.
fn prove(
    experiments: &[String],
    there: &Path,
    named: &BTreeSet<PathBuf>,
    plan: &Plan,
    store: &Store,
    kinds: &'static [Kind],
) -> Result<(), BundleError> {
    let paths: Vec<PathBuf> = experiments.iter().map(|file| there.join(file)).collect();
    let hint = "in a bundle every path must be relative to the TOML file that names it";
    if let Some(outside) = spec::sources(&paths).into_iter().find(|source| !source.starts_with(there)) {
        return Err(BundleError::Layout(format!("`{}` is named by an absolute path; {hint}", outside.display())));
    }
    let read = spec::read(&paths, &[], kinds).map_err(|mistakes| {
        BundleError::Layout(format!("the experiments cannot be read in another place:\n{}", mistakes.render(false)))
    })?;
    let again = Plan::new(&read, Some(store)).map_err(|error| BundleError::Layout(error.to_string()))?;
    for path in again.nodes.iter().flat_map(|node| node.files.keys()).map(Path::new) {
        let in_linked_folder = named.iter().any(|folder| path != folder && path.starts_with(folder));
        if !path.starts_with(there) && !in_linked_folder {
            return Err(BundleError::Layout(format!("`{}` is named by an absolute path; {hint}", path.display())));
        }
    }
    let same = again.nodes.iter().map(|node| &node.recipe).eq(plan.nodes.iter().map(|node| &node.recipe));
    if same {
        Ok(())
    } else {
        Err(BundleError::Layout("the experiments mean something else in another place".to_owned()))
    }
}

/// The deepest folder that holds every path.
fn common_root<'a>(mut paths: impl Iterator<Item = &'a PathBuf>) -> PathBuf {
    let mut root = paths.next().and_then(|path| path.parent()).unwrap_or(Path::new("/")).to_owned();
    for path in paths {
        while !path.parent().is_some_and(|folder| folder.starts_with(&root)) && root.pop() {}
    }
    root
}

fn relative(path: &Path, root: &Path) -> Result<String, BundleError> {
    let inside = path.strip_prefix(root).ok().and_then(Path::to_str);
    inside.map(str::to_owned).ok_or_else(|| BundleError::Layout(format!("`{}` is not UTF-8", path.display())))
}

/// Adds a file, or every file of a folder with links followed; such circles as a digest would refuse were refused by the plan.
fn gather(path: &Path, root: &Path, all: &mut BTreeMap<String, PathBuf>) -> Result<(), BundleError> {
    if std::fs::metadata(path).at("read", path)?.is_dir() {
        for entry in std::fs::read_dir(path).at("list", path)? {
            gather(&entry.at("list", path)?.path(), root, all)?;
        }
    } else {
        all.insert(relative(path, root)?, path.to_owned());
    }
    Ok(())
}

fn make_folder_of(path: &Path) -> Result<(), BundleError> {
    path.parent().map_or(Ok(()), |folder| std::fs::create_dir_all(folder).at("create the folder", folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_holds_everything() {
        let root = |paths: &[&str]| common_root(paths.iter().map(PathBuf::from).collect::<Vec<_>>().iter());
        assert_eq!(root(&["/a/b/c.toml"]), Path::new("/a/b"));
        assert_eq!(root(&["/a/b/c.toml", "/a/b/d/e"]), Path::new("/a/b"));
        assert_eq!(root(&["/a/b/c.toml", "/a/bc/d"]), Path::new("/a"));
        assert_eq!(root(&["/a/b/c.toml", "/a/b"]), Path::new("/a"));
        assert_eq!(root(&["/a/b", "/c"]), Path::new("/"));
    }
}
