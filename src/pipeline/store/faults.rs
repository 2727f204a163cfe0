//! A disk that fails at one operation, or from one operation on, for tests.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::disk::{Content, Disk, Entry, Sort, Stat};

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The device refuses once.
    ErrorOnce,
    /// The device refuses from now on.
    ErrorsOnwards,
    /// There is no space, and never again.
    Full,
    /// Half of the bytes fit, then there is no space once; operations that write nothing are refused.
    ShortWrite,
    /// The process is killed: nothing happens any more.
    Killed,
    /// The process may not, once; none of [`FAULTS`].
    Denied,
    /// Whatever takes space is refused from now on, also a new name in a folder; none of [`FAULTS`].
    NoRoom,
    /// Whatever changes anything is refused from now on; none of [`FAULTS`].
    ReadOnly,
}

/// Those that a disk may have whatever it is asked.
pub(super) const FAULTS: [Fault; 5] =
    [Fault::ErrorOnce, Fault::ErrorsOnwards, Fault::Full, Fault::ShortWrite, Fault::Killed];

/// A sync that a store has asked for.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// The operation that it was.
    pub(super) operation: usize,
    /// The line that asked, for whom, and of what.
    pub(super) site: String,
}

/// Another disk with a fault.
#[derive(Debug)]
pub(super) struct Faulty {
    disk: Arc<dyn Disk>,
    /// The syncs that are left out, by their number.
    omitted: HashSet<usize>,
    /// Where syncs were asked for, if that is written down.
    asked: Option<Mutex<Vec<Asked>>>,
    script: Mutex<Script>,
    meanwhile: Mutex<Option<Meanwhile>>,
    /// How far the clock is ahead of the disk's own, nanoseconds.
    ahead: Mutex<i128>,
}

/// What another process does before an operation, of which it is told the name and the path.
struct Meanwhile(Box<Intrusion>);

type Intrusion = dyn FnMut(&'static str, &Path) + Send;

impl fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Meanwhile")
    }
}

/// The operations that change nothing.
const READS: [&str; 7] = ["stat", "stat_target", "list", "read", "open", "read_link", "open_lock_there"];

#[derive(Debug, Default)]
struct Script {
    /// Operations so far, by name.
    taken: Vec<&'static str>,
    /// Syncs so far.
    syncs: usize,
    /// The operation to fail, from 0, and how.
    fault: Option<(usize, Fault)>,
}

/// What becomes of an operation that writes.
enum Write {
    Whole,
    Half(io::Error),
}

impl Faulty {
    /// `disk` without a fault.
    pub(super) fn new(disk: Arc<dyn Disk>) -> Self {
        let (script, meanwhile, ahead) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { disk, omitted: HashSet::new(), asked: None, script, meanwhile, ahead }
    }

    /// `disk` without a fault, for a store that leaves syncs out, by their number.
    pub(super) fn omitting(disk: Arc<dyn Disk>, omitted: HashSet<usize>) -> Self {
        Self { omitted, ..Self::new(disk) }
    }

    /// `disk` without a fault, that writes down where syncs are asked for.
    pub(super) fn tracing(disk: Arc<dyn Disk>) -> Self {
        Self { asked: Some(Mutex::default()), ..Self::new(disk) }
    }

    /// The syncs that were asked for, where that was written down.
    pub(super) fn asked(&self) -> Vec<Asked> {
        self.asked.as_ref().map(|asked| asked.lock().unwrap().clone()).unwrap_or_default()
    }

    /// Counts a sync; gives whether it is left out.
    fn leaves_out(&self, path: &Path) -> bool {
        let mut script = self.script.lock().unwrap();
        let number = script.syncs;
        script.syncs += 1;
        if let Some(asked) = &self.asked {
            asked
                .lock()
                .unwrap()
                .push(Asked { operation: script.taken.len() - 1, site: site(path, self.disk.stat(path)) });
        }
        self.omitted.contains(&number)
    }

    /// Counts from 0 again; the operation of this number fails.
    pub(super) fn fail_at(&self, number: usize, fault: Fault) {
        *self.script.lock().unwrap() = Script { fault: Some((number, fault)), ..Script::default() };
    }

    /// Nothing fails any more. Gives how many operations there were since [`Faulty::fail_at`].
    pub(super) fn heal(&self) -> usize {
        self.taken().len()
    }

    /// Nothing fails any more. Gives the names of the operations since the last time, or since [`Faulty::fail_at`].
    pub(super) fn taken(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.script.lock().unwrap()).taken
    }

    /// Lets so many nanoseconds pass on the disk's clock, or takes them back.
    pub(super) fn pass(&self, nanoseconds: i128) {
        *self.ahead.lock().unwrap() += nanoseconds;
    }

    /// Of every operation since [`Faulty::fail_at`] whether it may have changed anything.
    pub(super) fn changes(&self) -> Vec<bool> {
        self.script.lock().unwrap().taken.iter().map(|name| !READS.contains(name)).collect()
    }

    /// From now on `act` is called before each operation, with its name and path, as another process that comes between.
    pub(super) fn meanwhile(&self, act: impl FnMut(&'static str, &Path) + Send + 'static) {
        *self.meanwhile.lock().unwrap() = Some(Meanwhile(Box::new(act)));
    }

    /// Nobody comes between any more.
    pub(super) fn undisturbed(&self) {
        *self.meanwhile.lock().unwrap() = None;
    }

    /// Stands before an operation that writes no bytes.
    fn step(&self, name: &'static str, path: &Path) -> io::Result<&dyn Disk> {
        match self.write_step(name, path)? {
            Write::Whole => Ok(&*self.disk),
            Write::Half(error) => Err(error),
        }
    }

    fn write_step(&self, name: &'static str, path: &Path) -> io::Result<Write> {
        // Another thread that comes to the disk meanwhile is not disturbed.
        let meanwhile = self.meanwhile.lock().unwrap().take();
        if let Some(mut meanwhile) = meanwhile {
            meanwhile.0(name, path);
            self.meanwhile.lock().unwrap().get_or_insert(meanwhile);
        }
        let mut script = self.script.lock().unwrap();
        let taken = script.taken.len();
        script.taken.push(name);
        let Some((at, fault)) = script.fault else { return Ok(Write::Whole) };
        let onwards =
            matches!(fault, Fault::ErrorsOnwards | Fault::Full | Fault::Killed | Fault::NoRoom | Fault::ReadOnly);
        if taken != at && !(onwards && taken > at) {
            return Ok(Write::Whole);
        }
        match fault {
            Fault::ErrorOnce | Fault::ErrorsOnwards | Fault::Killed => Err(Errno::IO.into()),
            Fault::ShortWrite => Ok(Write::Half(Errno::NOSPC.into())),
            Fault::Full => Err(Errno::NOSPC.into()),
            Fault::Denied => Err(Errno::ACCESS.into()),
            Fault::NoRoom => {
                let takes_space = ["create", "append", "copy", "create_folder", "link", "rename"].contains(&name);
                // What is there already is said first.
                let is_new = name == "rename" || name == "append" || self.disk.stat(path).is_err();
                if takes_space && is_new { Err(Errno::NOSPC.into()) } else { Ok(Write::Whole) }
            }
            Fault::ReadOnly => {
                if READS.contains(&name) {
                    Ok(Write::Whole)
                } else {
                    Err(Errno::ROFS.into())
                }
            }
        }
    }

    fn write(
        &self,
        name: &'static str,
        path: &Path,
        bytes: &[u8],
        write: &dyn Fn(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        match self.write_step(name, path)? {
            Write::Whole => write(bytes),
            Write::Half(error) => write(&bytes[..bytes.len() / 2]).and(Err(error)),
        }
    }
}

/// The line of the store that asks for a sync, the one that asked that line where it is one of `durable`, and what is synced:
/// one line may ask for many things.
fn site(path: &Path, stat: io::Result<Stat>) -> String {
    let trace = std::backtrace::Backtrace::force_capture().to_string();
    let place = |line: &str| {
        let (_, place) = line.trim().strip_prefix("at ")?.split_once("src/pipeline/store/")?;
        let (place, _column) = place.rsplit_once(':')?;
        (!place.starts_with("faults.rs") && !place.starts_with("disk.rs")).then(|| place.to_owned())
    };
    let mut places = trace.lines().filter_map(place);
    let mut site = places.next().unwrap_or_default();
    if site.starts_with("durable.rs")
        && let Some(above) = places.find(|place| !place.starts_with("durable.rs"))
    {
        site = format!("{site} for {above}");
    }
    let sort = stat.map_or("nothing", |stat| if stat.sort == Sort::Folder { "a folder" } else { "a file" });
    let mut names = path.components().skip(2).map(|name| name.as_os_str().to_string_lossy());
    let (folder, depth) = (names.next().unwrap_or_default().into_owned(), names.count().min(2));
    format!("{site}: {sort} {depth} below `{folder}`")
}

impl Disk for Faulty {
    fn stat(&self, path: &Path) -> io::Result<Stat> {
        self.step("stat", path)?.stat(path)
    }

    fn stat_target(&self, path: &Path) -> io::Result<Stat> {
        self.step("stat_target", path)?.stat_target(path)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        self.step("list", folder)?.list(folder)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.step("read", path)?.read(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Content>> {
        self.step("open", path)?.open(path)
    }

    fn read_link(&self, path: &Path) -> io::Result<PathBuf> {
        self.step("read_link", path)?.read_link(path)
    }

    fn check_writable(&self, folder: &Path) -> io::Result<()> {
        self.step("check_writable", folder)?.check_writable(folder)
    }

    fn create(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.write("create", path, bytes, &|bytes| self.disk.create(path, bytes))
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.write("append", path, bytes, &|bytes| self.disk.append(path, bytes))
    }

    fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step("copy", from)?.copy(from, to)
    }

    fn create_folder(&self, path: &Path) -> io::Result<()> {
        self.step("create_folder", path)?.create_folder(path)
    }

    fn link(&self, target: &Path, path: &Path) -> io::Result<()> {
        self.step("link", path)?.link(target, path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step("rename", from)?.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.step("remove_file", path)?.remove_file(path)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        self.step("remove_folder", path)?.remove_folder(path)
    }

    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        self.step("set_mode", path)?.set_mode(path, mode)
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        let disk = self.step("sync", path)?;
        if self.leaves_out(path) { Ok(()) } else { disk.sync(path) }
    }

    fn sync_all(&self, path: &Path) -> io::Result<()> {
        let disk = self.step("sync_all", path)?;
        if self.leaves_out(path) { Ok(()) } else { disk.sync_all(path) }
    }

    fn now(&self) -> i128 {
        self.disk.now() + *self.ahead.lock().unwrap()
    }

    fn boot(&self) -> String {
        self.disk.boot()
    }

    fn open_lock(&self, path: &Path) -> io::Result<File> {
        self.step("open_lock", path)?.open_lock(path)
    }

    fn open_lock_there(&self, path: &Path) -> io::Result<File> {
        self.step("open_lock_there", path)?.open_lock_there(path)
    }
}
