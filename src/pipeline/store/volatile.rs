//! A disk in memory that knows what a power cut would leave of it, for tests.
//!
//! Every file has content that was synced and content that was not; every change of a folder is in a journal until a sync
//! makes it last. A cut keeps what was synced. Of the rest it keeps any part: each change of a name or a mode, or none;
//! of each file nothing, the old bytes, a torn beginning, zeros of the right length, or the new bytes. No file system in
//! use is that bad, and none promises to be better. Its clock is the coarsest there is, and the number of a file that is gone
//! is that of the next one that comes.

mod dice;
mod opened;
mod operations;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::disk::{Disk, Sort, Stat};
pub(super) use dice::Dice;

type Names = BTreeMap<OsString, u64>;

#[derive(Clone, Debug)]
enum Body {
    /// What is read now, and what was synced; `None` where it never was.
    File {
        bytes: Arc<Vec<u8>>,
        synced: Option<Arc<Vec<u8>>>,
    },
    /// The names as they are seen now, and those that a cut leaves whatever it does to the journal.
    Folder {
        names: Names,
        synced: Names,
    },
    Link(PathBuf),
}

#[derive(Clone, Debug)]
struct Inode {
    body: Body,
    mode: u32,
    synced_mode: u32,
    modified: i128,
    changed: i128,
    /// The number that a stat shows, which another file had before it.
    shown: u64,
}

/// Names set or taken away together, as by one system call.
#[derive(Clone, Debug)]
struct Change {
    names: Vec<(u64, OsString, Option<u64>)>,
    synced: bool,
}

#[derive(Clone, Debug)]
struct State {
    inodes: BTreeMap<u64, Inode>,
    journal: Vec<Change>,
    next: u64,
    /// Nanoseconds since 1970; it moves with every operation.
    clock: i128,
    /// The numbers that stats show.
    shown: BTreeSet<u64>,
    /// How often the machine was started.
    boots: usize,
}

/// Nanoseconds between two times that a file may bear.
const COARSE: i128 = 2_000_000_000;

/// See the module.
#[derive(Debug)]
pub(super) struct Volatile {
    state: Mutex<State>,
    /// What is locked in place of a file, by inode, because only a kernel can lock.
    locks: Mutex<BTreeMap<u64, File>>,
}

const ROOT: u64 = 1;

impl Volatile {
    /// A disk with nothing on it.
    pub(super) fn new() -> Self {
        let body = Body::Folder { names: Names::new(), synced: Names::new() };
        let root = Inode { body, mode: 0o755, synced_mode: 0o755, modified: 0, changed: 0, shown: ROOT };
        let inodes = [(ROOT, root)].into();
        let (next, clock, shown) = (ROOT + 1, 1_000_000_000, [ROOT].into());
        Self::of(State { inodes, journal: Vec::new(), next, clock, shown, boots: 1 })
    }

    fn of(state: State) -> Self {
        Self { state: Mutex::new(state), locks: Mutex::default() }
    }

    /// The same disk after every process was killed: nothing is lost.
    pub(super) fn after_kill(&self) -> Self {
        let disk = Self::of(self.state.lock().unwrap().clone());
        disk.pass(5 * COARSE);
        disk
    }

    /// What a power cut leaves, by the dice.
    pub(super) fn after_cut(&self, dice: &mut Dice) -> Self {
        let mut state = self.state.lock().unwrap().clone();
        state.cut(dice);
        let disk = Self::of(state);
        disk.pass(5 * COARSE);
        disk
    }

    /// Lets time pass, in nanoseconds.
    pub(super) fn pass(&self, time: i128) {
        self.state.lock().unwrap().clock += time;
    }

    /// Writes a file as a stage does, which syncs nothing.
    pub(super) fn put(&self, path: &Path, bytes: &[u8]) {
        (self as &dyn Disk).ensure_folder(path.parent().unwrap(), false).unwrap();
        let mut state = self.state.lock().unwrap();
        if let Ok(inode) = state.find(path, true) {
            state.write(inode, bytes.to_vec()).unwrap();
        } else {
            drop(state);
            self.create(path, bytes).unwrap();
        }
    }
}

impl State {
    fn tick(&mut self) -> i128 {
        self.clock += 1_000;
        self.clock - self.clock % COARSE
    }

    /// The smallest number that no file shows.
    fn free_number(&mut self) -> u64 {
        let free =
            (ROOT..=self.next).find(|number| !self.shown.contains(number)).expect("fewer are shown than there were");
        self.shown.insert(free);
        free
    }

    fn inode(&self, number: u64) -> &Inode {
        &self.inodes[&number]
    }

    fn inode_mut(&mut self, number: u64) -> &mut Inode {
        self.inodes.get_mut(&number).expect("names lead to inodes")
    }

    fn names(&self, folder: u64) -> io::Result<&Names> {
        match &self.inode(folder).body {
            Body::Folder { names, .. } => Ok(names),
            _ => Err(Errno::NOTDIR.into()),
        }
    }

    /// The inode of a path. Links on the way are followed, and one at the end where `follow`.
    fn find(&self, path: &Path, follow: bool) -> io::Result<u64> {
        let mut todo: Vec<OsString> = path.components().rev().filter_map(name_of).collect();
        let mut above = vec![ROOT];
        let mut links = 0;
        while let Some(name) = todo.pop() {
            let here = *above.last().expect("the root stays");
            if name == ".." {
                above.truncate((above.len() - 1).max(1));
                continue;
            }
            let found = *self.names(here)?.get(&name).ok_or(Errno::NOENT)?;
            match &self.inode(found).body {
                Body::Link(target) if follow || !todo.is_empty() => {
                    links += 1;
                    if links > 16 {
                        return Err(Errno::LOOP.into());
                    }
                    if target.is_absolute() {
                        above.truncate(1);
                    }
                    todo.extend(target.components().rev().filter_map(name_of));
                }
                _ => above.push(found),
            }
        }
        Ok(*above.last().expect("the root stays"))
    }

    /// The folder that holds a path, and the name in it.
    fn place(&self, path: &Path) -> io::Result<(u64, OsString)> {
        let name = path.file_name().ok_or(Errno::INVAL)?.to_owned();
        let folder = self.find(path.parent().ok_or(Errno::INVAL)?, true)?;
        self.names(folder)?;
        Ok((folder, name))
    }

    fn add(&mut self, path: &Path, body: Body, mode: u32) -> io::Result<u64> {
        let (folder, name) = self.place(path)?;
        if self.names(folder)?.contains_key(&name) {
            return Err(Errno::EXIST.into());
        }
        let (number, now) = (self.next, self.tick());
        self.next += 1;
        let shown = self.free_number();
        self.inodes.insert(number, Inode { body, mode, synced_mode: mode, modified: now, changed: now, shown });
        self.change(vec![(folder, name, Some(number))]);
        Ok(number)
    }

    /// Changes names at once for whoever looks, and in the journal for a cut.
    fn change(&mut self, names: Vec<(u64, OsString, Option<u64>)>) {
        let now = self.tick();
        let mut gone = Vec::new();
        for (folder, name, number) in &names {
            let inode = self.inode_mut(*folder);
            inode.modified = now;
            inode.changed = now;
            let Body::Folder { names, .. } = &mut inode.body else { panic!("changes are those of folders") };
            let before = match number {
                Some(number) => names.insert(name.clone(), *number),
                None => names.remove(name),
            };
            gone.extend(before);
        }
        // Those that have got another name stay.
        for number in gone.into_iter().filter(|gone| !names.iter().any(|(_, _, number)| *number == Some(*gone))) {
            let shown = self.inode(number).shown;
            self.shown.remove(&shown);
        }
        self.journal.push(Change { names, synced: false });
    }

    fn write(&mut self, number: u64, new: Vec<u8>) -> io::Result<()> {
        let now = self.tick();
        let inode = self.inode_mut(number);
        let Body::File { bytes, .. } = &mut inode.body else { return Err(Errno::ISDIR.into()) };
        *bytes = Arc::new(new);
        inode.modified = now;
        inode.changed = now;
        Ok(())
    }

    fn bytes(&self, path: &Path) -> io::Result<(u64, Arc<Vec<u8>>)> {
        let number = self.find(path, true)?;
        match &self.inode(number).body {
            Body::File { bytes, .. } => Ok((number, Arc::clone(bytes))),
            _ => Err(Errno::ISDIR.into()),
        }
    }

    fn stat(&self, number: u64) -> Stat {
        let inode = self.inode(number);
        let (sort, size) = match &inode.body {
            Body::File { bytes, .. } => (Sort::File, bytes.len() as u64),
            Body::Folder { .. } => (Sort::Folder, 0),
            Body::Link(_) => (Sort::Link, 0),
        };
        Stat { sort, mode: inode.mode, links: 1, identity: (7, inode.shown, size, inode.modified, inode.changed) }
    }

    fn sync(&mut self, number: u64) {
        let inode = self.inode_mut(number);
        inode.synced_mode = inode.mode;
        match &mut inode.body {
            Body::File { bytes, synced } => *synced = Some(Arc::clone(bytes)),
            Body::Folder { .. } => {
                for change in &mut self.journal {
                    change.synced |= change.names.iter().any(|(folder, ..)| *folder == number);
                }
                self.compact();
            }
            Body::Link(_) => {}
        }
    }

    fn sync_all(&mut self) {
        for change in &mut self.journal {
            change.synced = true;
        }
        self.compact();
        let all: Vec<u64> = self.inodes.keys().copied().collect();
        for number in all {
            self.sync(number);
        }
    }

    /// Takes what is synced from the front of the journal. What is synced behind something that is not stays in its turn.
    fn compact(&mut self) {
        let front = self.journal.iter().take_while(|change| change.synced).count();
        for change in self.journal.drain(..front).collect::<Vec<_>>() {
            for (folder, name, number) in change.names {
                let Body::Folder { synced, .. } = &mut self.inode_mut(folder).body else { panic!("folders stay") };
                match number {
                    Some(number) => synced.insert(name, number),
                    None => synced.remove(&name),
                };
            }
        }
    }

    fn cut(&mut self, dice: &mut Dice) {
        // Each change is kept or lost; how likely, is thrown once, so that nearly all and nearly nothing occur too.
        let odds = [1, 4, 8, 12, 15][dice.roll(5)];
        let kept = |dice: &mut Dice| dice.roll(16) < odds;
        self.journal.retain_mut(|change| {
            change.synced = change.synced || kept(dice);
            change.synced
        });
        self.compact();
        for inode in self.inodes.values_mut() {
            if inode.mode != inode.synced_mode && !kept(dice) {
                inode.mode = inode.synced_mode;
            }
            inode.synced_mode = inode.mode;
            match &mut inode.body {
                Body::Folder { names, synced } => names.clone_from(synced),
                Body::File { bytes, synced } => {
                    if synced.as_ref() != Some(bytes) {
                        let new = std::mem::take(bytes);
                        *bytes = match dice.roll(5) {
                            0 => Arc::default(),
                            1 => synced.clone().unwrap_or_default(),
                            2 => Arc::new(new[..dice.roll(new.len() + 1)].to_vec()),
                            3 => Arc::new(vec![0; new.len()]),
                            _ => new,
                        };
                    }
                    *synced = Some(Arc::clone(bytes));
                }
                Body::Link(_) => {}
            }
        }
        self.keep_one_name_each();
    }

    /// A move of which another one was lost may leave two names; the later one is the file's.
    fn keep_one_name_each(&mut self) {
        let mut seen = BTreeSet::new();
        let mut open = vec![ROOT];
        while let Some(folder) = open.pop() {
            let Body::Folder { names, synced } = &mut self.inode_mut(folder).body else { continue };
            names.retain(|_, number| seen.insert(*number));
            synced.clone_from(names);
            open.extend(names.values().copied());
        }
        self.inodes.retain(|number, _| *number == ROOT || seen.contains(number));
        self.boots += 1;
        self.shown.clear();
        let numbers: Vec<u64> = self.inodes.keys().copied().collect();
        // Of two that had one number after each other, the later one keeps it.
        for number in numbers.into_iter().rev() {
            let shown = self.inode(number).shown;
            if !self.shown.insert(shown) {
                self.inode_mut(number).shown = self.free_number();
            }
        }
    }
}

fn name_of(component: Component<'_>) -> Option<OsString> {
    match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::Native;
    use super::*;

    /// One operation on names by number; the answers are told as words that both disks should agree in.
    fn operate(disk: &dyn Disk, root: &Path, dice: &mut Dice) -> String {
        let names = ["a", "b", "a/c", "a/d", "b/c", "a/c/e", "l", "a/l"];
        let mut path = || root.join(names[dice.roll(names.len())]);
        let (one, two) = (path(), path());
        let told = |result: io::Result<String>| result.unwrap_or_else(|error| format!("{:?}", error.kind()));
        let done = |result: io::Result<()>| told(result.map(|()| "done".to_owned()));
        let (which, bytes) = (dice.roll(13), vec![b'x'; dice.roll(4)]);
        let result = match which {
            0 => done(disk.create(&one, &bytes)),
            // The store appends through no link.
            1 if disk.stat(&one).is_ok_and(|stat| stat.sort == Sort::Link) => String::new(),
            1 => done(disk.append(&one, &bytes)),
            2 => told(disk.read(&one).map(|bytes| format!("{bytes:?}"))),
            3 | 4 => done(disk.create_folder(&one)),
            5 | 6 => done(disk.rename(&one, &two)),
            7 => done(disk.remove_file(&one)),
            8 => done(disk.remove_folder(&one)),
            9 => done(disk.link(Path::new("a"), &one)),
            10 => done(disk.set_mode(&one, 0o755).and_then(|()| disk.sync(&one))),
            11 => told(disk.read_link(&one).map(|target| format!("{target:?}"))),
            _ => done(disk.remove_tree(&one)),
        };
        format!("{which} {one:?} {two:?}: {result}")
    }

    /// Everything below a folder: names, sorts, sizes and executable bits.
    fn picture(disk: &dyn Disk, root: &Path, folder: &Path, shown: &mut Vec<String>) {
        let mut entries = disk.list(folder).unwrap();
        entries.sort();
        for entry in entries {
            let path = folder.join(&entry.name);
            let stat = disk.stat(&path).unwrap();
            assert_eq!(stat.sort == Sort::Folder, entry.is_folder);
            let size = if stat.sort == Sort::File { stat.size() } else { 0 };
            shown.push(format!(
                "{} {:?} {size} {}",
                path.strip_prefix(root).unwrap().display(),
                stat.sort,
                stat.is_executable()
            ));
            if entry.is_folder {
                picture(disk, root, &path, shown);
            }
        }
    }

    #[test]
    fn it_answers_as_the_real_one_does() {
        for seed in 0..60 {
            let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
            let (model, root) = (Volatile::new(), Path::new("/root"));
            model.create_folder(root).unwrap();
            let (mut real_dice, mut dice) = (Dice(seed), Dice(seed));
            for step in 0..120 {
                let real =
                    operate(&Native, place.path(), &mut real_dice).replace(place.path().to_str().unwrap(), "/root");
                assert_eq!(operate(&model, root, &mut dice), real, "seed {seed}, step {step}");
                let (mut expected, mut found) = (Vec::new(), Vec::new());
                picture(&Native, place.path(), place.path(), &mut expected);
                picture(&model, root, root, &mut found);
                assert_eq!(found, expected, "seed {seed}, step {step}: {real}");
            }
        }
    }

    #[test]
    fn numbers_come_again_and_times_are_coarse() {
        let model = Volatile::new();
        let (one, two) = (Path::new("/f/one"), Path::new("/f/two"));
        model.create_folder(Path::new("/f")).unwrap();
        model.create(one, b"1").unwrap();
        let before = model.stat(one).unwrap();
        model.create(two, b"2").unwrap();
        assert_ne!(model.stat(two).unwrap().identity.1, before.identity.1);
        model.rename(two, one).unwrap();
        model.create(two, b"3").unwrap();
        assert_eq!(model.stat(two).unwrap().identity, before.identity, "nothing tells it from the first");
        model.pass(COARSE);
        model.put(two, b"4");
        assert_ne!(model.stat(two).unwrap().identity, before.identity);
    }

    #[test]
    fn a_cut_keeps_what_was_synced_and_any_part_of_the_rest() {
        let model = Volatile::new();
        let path = Path::new;
        model.create_folder(path("/f")).unwrap();
        model.create(path("/f/kept"), b"old").unwrap();
        for synced in ["/f/kept", "/f", "/"] {
            model.sync(path(synced)).unwrap();
        }
        model.put(path("/f/kept"), b"later");
        model.create(path("/f/new"), b"new").unwrap();
        model.sync(path("/f/new")).unwrap();
        model.rename(path("/f/new"), path("/moved")).unwrap();
        let (mut contents, mut places) = (BTreeSet::new(), BTreeSet::new());
        for seed in 0..200 {
            let left = model.after_cut(&mut Dice(seed));
            contents.insert(left.read(path("/f/kept")).unwrap());
            let there = ["/f/new", "/moved"].map(|name| left.read(path(name)).is_ok_and(|bytes| bytes == b"new"));
            places.insert(there);
        }
        for content in ["", "old", "later", "\0\0\0\0\0", "la"] {
            assert!(contents.contains(content.as_bytes()), "{content:?} of {contents:?}");
        }
        assert_eq!(places, [[false, false], [false, true], [true, false]].into());
        model.sync(path("/f")).unwrap();
        let left = model.after_cut(&mut Dice(0));
        assert!(
            left.read(path("/moved")).is_ok() && left.read(path("/f/new")).is_err(),
            "both sides of a move at once"
        );
    }
}
