//! The chart as it renders, with everything on, beside what is recorded. `WEIR_BLESS=1` records.

use std::ffi::OsString;
use std::process::Command;

/// Helm 3, and Helm 4 where there is one ($HELM4).
fn helms() -> Vec<OsString> {
    let first = std::env::var_os("HELM").unwrap_or_else(|| "helm".into());
    std::iter::once(first).chain(std::env::var_os("HELM4")).collect()
}

/// The chart with these values and arguments, by each Helm.
fn rendered(values: &str, more: &[&str]) -> Vec<String> {
    let render = |helm: OsString| {
        let mut command = Command::new(helm);
        command.args(["template", "weir", "-n", "weir", "--kube-version", "1.34.0", "--set", values]).args(more);
        let done = command.arg(weir_e2e::chart()).output().expect("helm");
        assert!(done.status.success(), "{values}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    helms().into_iter().map(render).collect()
}

/// Documents of a kind.
fn documents(rendered: &str, kind: &str) -> Vec<serde_json::Value> {
    let documents = rendered.split("\n---").filter(|d| d.contains(&format!("\nkind: {kind}\n")));
    documents.map(|d| serde_yaml_ng::from_str(d).expect("YAML")).collect()
}

#[test]
#[ignore = "needs Helm: make e2e"]
fn the_number_of_brokers_is_left_to_others_where_it_is_null() {
    for (value, wanted) in [("cluster.brokers=null", serde_json::Value::Null), ("cluster.brokers=5", 5.into())] {
        for text in rendered(value, &[]) {
            let cluster = documents(&text, "StreamCluster").remove(0);
            assert_eq!(cluster["spec"]["brokers"], wanted, "{value}");
            assert_eq!(cluster["spec"]["storage"]["size"], "10Gi", "the rest is there");
        }
    }
}

#[test]
#[ignore = "needs Helm: make e2e"]
fn secrets_of_a_private_registry_are_in_every_pod() {
    for text in rendered("pullSecrets[0].name=registry", &[]) {
        let mut pods = Vec::new();
        for kind in ["Deployment", "Job"] {
            pods.extend(documents(&text, kind).into_iter().map(|d| d["spec"]["template"]["spec"].clone()));
        }
        pods.extend(documents(&text, "Pod").into_iter().map(|d| d["spec"].clone()));
        pods.extend(documents(&text, "StreamCluster").into_iter().map(|d| d["spec"].clone()));
        assert_eq!(pods.len(), 4, "the operator, two hooks, and the cluster's pods");
        for pod in pods {
            assert_eq!(pod["imagePullSecrets"][0]["name"], "registry", "{pod}");
        }
    }
}

/// What OpenShift's class `restricted-v2` refuses in a pod.
fn refused(pod: &serde_json::Value) -> Vec<String> {
    const VOLUMES: [&str; 8] =
        ["configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"];
    let mut out = Vec::new();
    let mut check = |holds: bool, what: &str| out.extend((!holds).then(|| what.to_owned()));
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        check(pod[field].is_null(), field);
    }
    for volume in list(&pod["volumes"]) {
        let kinds = volume.as_object().unwrap().keys().filter(|key| *key != "name");
        check(kinds.clone().all(|kind| VOLUMES.contains(&kind.as_str())), "a volume");
    }
    check(pod["securityContext"]["fsGroup"].is_null(), "a group of its own for volumes");
    check(pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", "a seccomp profile");
    for container in list(&pod["containers"]).iter().chain(&list(&pod["initContainers"])) {
        let context = &container["securityContext"];
        check(context["allowPrivilegeEscalation"] == false, "privilege escalation");
        check(context["privileged"].is_null(), "privileges");
        check(context["capabilities"] == serde_json::json!({"drop": ["ALL"]}), "capabilities");
        check(list(&container["ports"]).iter().all(|port| port["hostPort"].is_null()), "a port of the host");
        for place in [context, &pod["securityContext"]] {
            check(place["runAsUser"].is_null() && place["runAsGroup"].is_null(), "a user of its own");
            check(place["seLinuxOptions"].is_null(), "a label of SELinux");
        }
    }
    out
}

#[test]
#[ignore = "needs Helm: make e2e"]
fn no_user_is_asked_for_where_the_platform_chooses_users() {
    let there = ["--api-versions", "security.openshift.io/v1"];
    for (values, more, fixed) in [
        ("openshift=auto", &[][..], true),
        ("openshift=auto", &there[..], false),
        ("openshift=true", &[][..], false),
        ("openshift=false", &there[..], true),
    ] {
        for text in rendered(values, more) {
            assert_eq!(text.contains("runAsUser: 65532"), fixed, "{values} {more:?}");
            let mut pods = documents(&text, "Pod").into_iter().map(|d| d["spec"].clone()).collect::<Vec<_>>();
            for kind in ["Deployment", "Job"] {
                pods.extend(documents(&text, kind).into_iter().map(|d| d["spec"]["template"]["spec"].clone()));
            }
            assert_eq!(pods.len(), 3, "the operator, and two hooks");
            for pod in pods {
                if !fixed {
                    let why = refused(&pod);
                    assert!(why.is_empty(), "{values} {more:?}: {why:?} in {pod}");
                }
                assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{pod}");
            }
        }
    }
}

#[test]
#[ignore = "needs Helm: make e2e"]
fn links_to_the_runbook_are_absolute_or_not_there() {
    let links = |values: &str| -> Vec<String> {
        let of = |text: String| {
            text.lines().filter_map(|l| l.trim().strip_prefix("runbook_url: ").map(str::to_owned)).collect::<Vec<_>>()
        };
        rendered(values, &[]).into_iter().flat_map(of).collect()
    };
    assert_eq!(links("monitoring.rules.enabled=true"), [""; 0]);
    let with = links("monitoring.rules.enabled=true,monitoring.rules.runbookUrl=https://wiki.example/weir");
    assert!(with.len() >= 10 && with.iter().all(|l| l.starts_with("https://wiki.example/weir#weir")), "{with:?}");
}

#[test]
#[ignore = "needs Helm: make e2e"]
fn the_chart_renders_as_recorded_and_lint_is_content() {
    let chart = weir_e2e::chart();
    let helm = std::env::var_os("HELM").unwrap_or_else(|| "helm".into());
    let run = |arguments: &[&str]| {
        let said = Command::new(&helm).args(arguments).arg(&chart).output().expect("helm");
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        String::from_utf8(said.stdout).unwrap()
    };
    run(&["lint", "--strict", "--kube-version", "1.34.0"]);
    let on = "monitoring.podMonitor.enabled=true,monitoring.rules.enabled=true,monitoring.dashboards.enabled=true,\
              monitoring.rules.runbookUrl=https://runbook.example/weir";
    let rendered = run(&["template", "weir", "-n", "weir", "--kube-version", "1.34.0", "--set", on]);
    let golden = chart.join("golden/all.yaml");
    if std::env::var_os("WEIR_BLESS").is_some() {
        std::fs::create_dir_all(golden.parent().unwrap()).unwrap();
        std::fs::write(&golden, rendered).unwrap();
    } else {
        let recorded = std::fs::read_to_string(&golden).unwrap_or_default();
        assert!(recorded == rendered, "charts/weir/golden/all.yaml is stale: run `make chart`");
    }
}

#[test]
#[ignore = "needs Helm: make e2e"]
fn values_that_cannot_be_right_are_refused() {
    let chart = weir_e2e::chart();
    let helm = std::env::var_os("HELM").unwrap_or_else(|| "helm".into());
    for bad in [
        "cluster.brokers=0",
        "cluster.storage.size=lots",
        "image.pullPolicy=Sometimes",
        "cluser.brokers=3",
        "openshift=maybe",
        "monitoring.rules.runbookUrl=docs/runbook.md",
        "cluster.networkPolicy.form=x",
    ] {
        let mut command = Command::new(&helm);
        command.args(["template", "weir", "--kube-version", "1.34.0", "--set", bad]).arg(&chart);
        assert!(!command.output().expect("helm").status.success(), "{bad} was taken");
    }
}
