//! Sources that may be folders or repositories of the Hugging Face hub.
//!
//! A repository is named with its commit: what a name alone stands for may change, and a result must not. Downloading is
//! behind the cargo feature `hub`; without it a repository is a mistake that says how to get the folder.

use std::path::{Path, PathBuf};

use crate::file::Source;
use crate::pipeline::stage::Problem;

/// What is wrong with `source` before anything runs, as a problem of the field `from`.
pub(crate) fn check(source: &Source) -> Option<Problem> {
    let Source::Repository(name) = source else { return None };
    let (repository, commit) =
        name.split_once('@').map_or((name.as_str(), None), |(name, commit)| (name, Some(commit)));
    let fetch = format!(
        "fetch it with `hf download {repository}{} --local-dir DIR` and name the folder",
        commit.map(|commit| format!(" --revision {commit}")).unwrap_or_default()
    );
    if !cfg!(feature = "hub") {
        let message = format!("there is no folder `{name}`, and this `pipe` is built without downloads from a hub");
        return Some(Problem::new("from", message).hint(format!("{fetch}, or build with `--features hub`")));
    }
    if commit.is_some_and(|commit| commit.len() == 40 && commit.chars().all(|c| c.is_ascii_hexdigit())) {
        return None;
    }
    let message = format!("there is no folder `{name}`, and a repository needs its commit: its name alone may change");
    let hint = format!("write `from = \"{repository}@COMMIT\"` with all 40 digits, or {fetch}");
    Some(Problem::new("from", message).hint(hint))
}

/// The folder of `source`; of a repository, the files that `wanted` asks for are downloaded below `work` first.
pub(crate) fn folder(source: &Source, work: &Path, wanted: &dyn Fn(&str) -> bool) -> anyhow::Result<PathBuf> {
    match source {
        Source::Folder(path) => Ok(path.clone()),
        Source::Repository(name) => download(name, work, wanted),
    }
}

#[cfg(not(feature = "hub"))]
fn download(name: &str, _: &Path, _: &dyn Fn(&str) -> bool) -> anyhow::Result<PathBuf> {
    anyhow::bail!("`{name}` is no folder, and this `pipe` is built without downloads from a hub")
}

#[cfg(feature = "hub")]
fn download(name: &str, work: &Path, wanted: &dyn Fn(&str) -> bool) -> anyhow::Result<PathBuf> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
    fetch(&endpoint, set("HF_TOKEN").as_deref(), name, &work.join("hub"), wanted)
}

/// Downloads the files of `organisation/name@commit` that `wanted` asks for into `folder`; what lies there whole is kept.
#[cfg(feature = "hub")]
fn fetch(
    endpoint: &str,
    token: Option<&str>,
    name: &str,
    folder: &Path,
    wanted: &dyn Fn(&str) -> bool,
) -> anyhow::Result<PathBuf> {
    use anyhow::Context as _;

    let (repository, commit) = name.split_once('@').context("a repository needs its commit")?;
    let get = |url: &str| {
        let mut request = ureq::get(url);
        if let Some(token) = token {
            request = request.header("Authorization", &format!("Bearer {token}"));
        }
        request.call().with_context(|| format!("cannot fetch `{url}`; for a gated repository set HF_TOKEN"))
    };
    let listing = format!("{endpoint}/api/models/{repository}/revision/{commit}");
    let text = get(&listing)?.body_mut().read_to_string().with_context(|| format!("cannot read `{listing}`"))?;
    let listed: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("`{listing}` gave no JSON"))?;
    let files = listed["siblings"].as_array().with_context(|| format!("`{listing}` lists no files"))?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    // Files in folders belong to other programs, and what leads out of the folder to nobody.
    let names = files.iter().filter_map(|file| file["rfilename"].as_str()).filter(|name| !name.contains(['/', '\\']));
    for name in names.filter(|name| wanted(name)) {
        let place = folder.join(name);
        if place.exists() {
            continue;
        }
        let writing = || format!("cannot write `{}`", place.display());
        let mut body = get(&format!("{endpoint}/{repository}/resolve/{commit}/{name}"))?;
        let mut file = tempfile::NamedTempFile::new_in(folder).with_context(writing)?;
        let mut reader = body.body_mut().with_config().limit(u64::MAX).reader();
        std::io::copy(&mut reader, &mut file).with_context(writing)?;
        file.persist(&place).with_context(writing)?;
    }
    Ok(folder.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_says_what_it_lacks() {
        assert!(check(&Source::Folder("/models/a".into())).is_none());
        let problem = check(&Source::Repository("Qwen/Qwen2.5-0.5B".to_owned())).unwrap();
        assert!(problem.hint.unwrap().contains("hf download Qwen/Qwen2.5-0.5B --local-dir"));
        let pinned = format!("Qwen/Qwen2.5-0.5B@{}", "0a".repeat(20));
        assert_eq!(check(&Source::Repository(pinned)).is_none(), cfg!(feature = "hub"));
    }

    /// A hub on this machine that knows one repository.
    #[cfg(feature = "hub")]
    #[test]
    fn the_wanted_files_of_a_commit_are_fetched() {
        use std::io::{BufRead as _, BufReader, Write as _};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let mut asked = Vec::new();
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().unwrap();
                let lines: Vec<String> =
                    BufReader::new(&stream).lines().map(Result::unwrap).take_while(|line| !line.is_empty()).collect();
                let path = lines[0].split(' ').nth(1).unwrap().to_owned();
                let body = if path.starts_with("/api") {
                    r#"{"siblings": [{"rfilename": "config.json"}, {"rfilename": "a.bin"}, {"rfilename": "../b.json"}]}"#
                } else {
                    "{}"
                };
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
                stream.write_all((head + body).as_bytes()).unwrap();
                let token = lines.iter().any(|line| line.eq_ignore_ascii_case("authorization: Bearer secret"));
                asked.push((path, token));
            }
            asked
        });
        let work = tempfile::tempdir().unwrap();
        let wanted = |name: &str| std::path::Path::new(name).extension().is_some_and(|end| end == "json");
        fetch(&endpoint, Some("secret"), "o/n@c0", work.path(), &wanted).unwrap();
        let asked =
            [("/api/models/o/n/revision/c0".to_owned(), true), ("/o/n/resolve/c0/config.json".to_owned(), true)];
        assert_eq!(server.join().unwrap(), asked);
        let names: Vec<_> = std::fs::read_dir(work.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["config.json"]);
    }
}
