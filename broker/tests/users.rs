//! A broker under a user that the platform chose, as OpenShift does: nobody knows it, its group is 0, it has no home, and all that it may
//! write to is its folder, which group 0 may write to.

mod process;

use process::Broker;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

/// Of a namespace's range on OpenShift.
const CHOSEN: u32 = 1_000_680_000;
/// Who made the folder, as in the image.
const USER: u32 = 65_532;

fn allow(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_runs_under_any_user_of_group_0_without_a_home() {
    let folder = tempfile::tempdir().unwrap();
    let (path, data) = (folder.path().join("weir-broker"), folder.path().join("data"));
    std::fs::copy(env!("CARGO_BIN_EXE_weir-broker"), &path).unwrap(); // where that user may read it
    std::fs::create_dir(&data).unwrap();
    // who may not take another user's place tries it under its own
    let is_root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    let program = || {
        let mut program = Command::new(&path);
        program.env_clear().current_dir("/");
        if is_root {
            program.uid(CHOSEN).gid(0);
        }
        program
    };
    if is_root {
        for path in [folder.path(), &path] {
            allow(path, 0o755);
        }
        chown(&data, Some(USER), Some(0)).unwrap();
        allow(&data, 0o775);
    }
    Broker::start(program(), &data).await.stop();
    // again, with what it wrote
    Broker::start(program(), &data).await.stop();
    if is_root {
        assert_eq!(std::fs::metadata(data.join("db")).unwrap().uid(), CHOSEN, "it ran as the user that was chosen");
    }
}
