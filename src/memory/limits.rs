//! What this process may have of its machine's memory: limits of its own, and those of its control
//! groups (version 2), which all processes inside share.

use std::fs;
use std::path::Path;

/// A limit and what is left of it, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    pub left: u64,
    pub name: String,
    /// Of a control group its path, which ends with a slash: whoever is inside shares it.
    pub group: Option<String>,
}

/// The limits that this process is under.
pub fn limits() -> Vec<Limit> {
    let mut found = of_process(
        &fs::read_to_string("/proc/self/limits").unwrap_or_default(),
        super::gauge::status,
    );
    if let Some(path) = control_group() {
        found.extend(of_groups(Path::new("/sys/fs/cgroup"), &path));
    }
    found
}

/// The path of this process's control group, with a slash at its end.
pub fn control_group() -> Option<String> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(format!("{}/", path.trim_end_matches('/')))
}

/// `text` has lines such as "Max data size   655360000   unlimited   bytes"; `unlimited` is no number.
fn of_process(text: &str, used: impl Fn(&str) -> Option<u64>) -> Vec<Limit> {
    let soft = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    };

    let limit = |key: &str, used_key: &str, name: &str| {
        let left = u64::saturating_sub(soft(key)?, used(used_key)?);
        Some(Limit { left, name: name.to_owned(), group: None })
    };

    let data = limit("Max data size", "VmData:", "the limit of data (ulimit -d)");
    let space = limit("Max address space", "VmSize:", "the limit of address space (ulimit -v)");
    data.into_iter().chain(space).collect()
}

/// The limits of a group and of those above it, as the control groups' file system tells them. What
/// is used of one is its anonymous and its shared memory: the kernel gives up cached files before
/// it kills.
fn of_groups(root: &Path, path: &str) -> Vec<Limit> {
    let mut found = Vec::new();
    for (end, _) in path.match_indices('/') {
        let group = &path[..=end];
        let folder = root.join(group.trim_start_matches('/'));
        let number = |text: &str| text.trim().parse::<u64>().ok(); // "max" is none
        let Some(limit) =
            fs::read_to_string(folder.join("memory.max")).ok().as_deref().and_then(number)
        else {
            continue;
        };

        let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let used = |key: &str| {
            stat.lines().find_map(|line| line.strip_prefix(key)).and_then(number).unwrap_or(0)
        };

        let used = used("anon ") + used("shmem ");
        let name = format!("memory.max of the control group {group}");
        found.push(Limit { left: limit.saturating_sub(used), name, group: Some(group.to_owned()) });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_the_process_are_less_what_is_used() {
        let text = "Limit   Soft Limit   Hard Limit   Units\n\
                    Max data size             655360000            unlimited            bytes     \n\
                    Max address space         unlimited            unlimited            bytes     \n";
        let found = of_process(text, |key| (key == "VmData:").then_some(55_360_000));
        assert_eq!(found.iter().map(|limit| limit.left).collect::<Vec<_>>(), [600_000_000]);
        assert!(of_process("", |_| Some(1)).is_empty());
    }

    #[test]
    fn a_group_has_its_own_limit_and_those_above_it() {
        let root = tempfile::tempdir().unwrap();
        let make = |folder: &str, limit: &str, stat: &str| {
            let folder = root.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("memory.max"), limit).unwrap();
            fs::write(folder.join("memory.stat"), stat).unwrap();
        };
        make("job", "1000\n", "file 700\nanon 200\nshmem 100\n");
        make("job/step", "max\n", "anon 300\n");
        make("job/step/task", "400\n", "anon 500\n");
        let found = of_groups(root.path(), "/job/step/task/");
        let found: Vec<_> =
            found.iter().map(|limit| (limit.left, limit.group.as_deref().unwrap())).collect();
        assert_eq!(found, [(700, "/job/"), (0, "/job/step/task/")]);
    }
}
