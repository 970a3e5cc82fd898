//! The chart as it renders, with everything on, beside what is recorded. `WEIR_BLESS=1` records.

use std::process::Command;

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
    let on = "monitoring.podMonitor.enabled=true,monitoring.rules.enabled=true,monitoring.dashboards.enabled=true";
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
    for bad in ["cluster.brokers=0", "cluster.storage.size=lots", "image.pullPolicy=Sometimes", "cluser.brokers=3"] {
        let mut command = Command::new(&helm);
        command.args(["template", "weir", "--kube-version", "1.34.0", "--set", bad]).arg(&chart);
        assert!(!command.output().expect("helm").status.success(), "{bad} was taken");
    }
}
