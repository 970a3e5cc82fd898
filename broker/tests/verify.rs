//! `weir-broker verify`: what it says of a folder, and that it changes nothing there.

mod process;

use process::{Broker, PATIENCE};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use weir_proto::v1;

fn contents(path: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            contents(&entry, found);
        } else if entry.metadata().unwrap().len() < 64 << 20 {
            found.insert(entry.clone(), std::fs::read(&entry).unwrap());
        }
    }
}

fn verify(data: &Path, more: &[&str]) -> Output {
    program().arg("verify").arg(data).args(more).output().unwrap()
}

/// The program.
fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_weir-broker"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_brokers_folder_is_read_without_being_changed_and_damage_is_named_per_partition() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    assert!(!verify(data, &[]).status.success(), "no broker's folder");
    let running = Broker::start(program(), data).await;
    let admin = format!("http://{}", running.admin);
    let spec = v1::TopicSpec { partitions: 2, replicas: 1, ..Default::default() };
    let request = v1::ApplyTopicRequest { name: "orders".into(), spec: Some(spec), ..Default::default() };
    let mut admin = v1::admin_client::AdminClient::connect(admin).await.unwrap();
    admin.apply_topic(request).await.unwrap();
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", running.client)).unwrap();
    let mut publisher = v1::publisher_client::PublisherClient::connect(endpoint).await.unwrap();
    for partition in [0, 1] {
        for _ in 0..20 {
            let message = v1::Message { value: Some(vec![7; 5_000].into()), ..Default::default() };
            let request = v1::PublishRequest {
                topic: "orders".into(),
                partition: Some(partition),
                messages: vec![message],
                ..Default::default()
            };
            let end = Instant::now() + PATIENCE;
            while let Err(error) = publisher.publish(request.clone()).await {
                assert!(Instant::now() < end, "{error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    let output = verify(data, &[]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("a broker runs"), "{text}");
    running.stop();
    // a start writes what is in the log to tables and blob files
    Broker::start(program(), data).await.stop();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let unwritten = program().arg("verify").arg(data).stdout(full).output().unwrap();
    let said = String::from_utf8(unwritten.stderr).unwrap();
    assert!(unwritten.status.code() == Some(1) && said.contains("cannot write output"), "{said}");
    let copy = tempfile::tempdir().unwrap();
    assert!(Command::new("cp").arg("-r").arg(data).arg(copy.path().join("b")).status().unwrap().success());
    let data = copy.path().join("b");
    let mut before = BTreeMap::new();
    contents(&data, &mut before);

    let output = verify(&data, &["-o", "json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success(), "{report:#}");
    assert_eq!(report["remedy"], "none");
    let partitions = report["partitions"].as_array().unwrap();
    let orders = partitions.iter().filter(|p| p["name"].as_str().is_some_and(|n| n.starts_with("default/orders/")));
    for partition in orders.clone() {
        assert_eq!((partition["start_offset"].as_u64(), partition["end_offset"].as_u64()), (Some(0), Some(20)));
        assert_eq!(partition["unreadable"], 0);
    }
    assert_eq!(orders.count(), 2);
    let text = String::from_utf8(verify(&data, &[]).stdout).unwrap();
    assert!(text.contains("default/orders/1: offsets 0 to 20") && text.contains("all is whole"), "{text}");

    let blob = before.keys().find(|f| f.extension().is_some_and(|e| e == "blob")).unwrap().clone();
    let mut bytes = before[&blob].clone();
    bytes[10_000] ^= 4;
    std::fs::write(&blob, &bytes).unwrap();
    let output = verify(&data, &["-o", "json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!output.status.success(), "{report:#}");
    assert_eq!(report["remedy"], "restore");
    let named = report["files"][0].as_str().unwrap();
    assert!(named.contains(blob.file_name().unwrap().to_str().unwrap()), "{named}");
    let damaged = report["partitions"].as_array().unwrap().iter().filter(|p| p["unreadable"] == 1);
    assert_eq!(damaged.count(), 1, "{report:#}");
    std::fs::write(&blob, &before[&blob]).unwrap();

    let mut after = BTreeMap::new();
    contents(&data, &mut after);
    assert!(before == after, "the folder is as it was");
}

/// A folder does not say whether there are other brokers, where its store does not open: both ways are told.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_does_not_open_is_rebuilt_from_others_or_restored_from_a_copy() {
    let folder = tempfile::tempdir().unwrap();
    Broker::start(program(), folder.path()).await.stop();
    std::fs::remove_file(folder.path().join("db/CURRENT")).unwrap();
    let output = verify(folder.path(), &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!output.status.success(), "{text}");
    let help = "start the broker while the other brokers run: it is rebuilt from them; without others, restore the damaged file from a copy";
    assert!(text.contains(help), "{text}");
}
