//! Writing past the page cache, where the file system can.

use rustix::fs::OFlags;
use std::fs::{OpenOptions, remove_file};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Memory, place and length of what is written that way are multiples of this.
const BLOCK_BYTES: usize = 4 << 10;

/// Whether files in `folder`, which exists, can be written with `O_DIRECT`.
pub(crate) fn works(folder: &Path) -> bool {
    let probe = folder.join("direct.probe");
    let memory = vec![0; 2 * BLOCK_BYTES];
    let from = memory.as_ptr().align_offset(BLOCK_BYTES);
    let write = || {
        let flags = OFlags::DIRECT.bits().cast_signed();
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(&probe)?;
        file.write_all(memory.get(from..from + BLOCK_BYTES).unwrap_or_default())
    };
    let written = write();
    let _ = remove_file(&probe);
    written.is_ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_folder_that_is_not_there_cannot_and_the_probe_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!super::works(&folder.path().join("gone")));
        super::works(folder.path());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
