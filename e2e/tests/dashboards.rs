//! Every panel and every rule against a real Prometheus that scrapes loaded brokers: each must give data.

use serde_json::Value;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Ended when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// `weir` as the workspace built it: beside this test.
fn weir() -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    test.ancestors().nth(2).expect("target/debug/deps/TEST").join("weir")
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port()
}

/// (where it stands, query)
fn queries() -> Vec<(String, String)> {
    let mut out = Vec::new();
    for file in ["overview", "topic"] {
        let text = std::fs::read_to_string(weir_e2e::repository().join(format!("charts/weir/dashboards/{file}.json")))
            .unwrap();
        let board: Value = serde_json::from_str(&text).unwrap();
        for panel in board["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().unwrap() {
                let query = target["expr"].as_str().unwrap().replace("$namespace", ".*").replace("$topic", ".*");
                out.push((format!("{file}: {}", panel["title"]), query));
            }
        }
    }
    let rules = std::fs::read_to_string(weir_e2e::repository().join("charts/weir/rules.yaml")).unwrap();
    let rules: Value = serde_yaml_ng::from_str(&rules).unwrap();
    let runbook = std::fs::read_to_string(weir_e2e::repository().join("docs/runbook.md")).unwrap();
    for rule in rules["groups"][0]["rules"].as_array().unwrap() {
        let (name, expression) = (rule["alert"].as_str().unwrap(), rule["expr"].as_str().unwrap());
        assert!(runbook.contains(&format!("## {name}\n")), "docs/runbook.md has no line for {name}");
        if expression.contains("weir_operator_") {
            continue; // there is no operator here
        }
        // a healthy cluster raises no alert, but what is compared must be there
        let at = expression.rfind([">", "<"].map(|c| c.chars().next().unwrap())).expect("a comparison");
        out.push((format!("rule {name}"), expression[..at].trim().to_owned()));
    }
    out
}

fn ask(server: &str, query: &str) -> usize {
    let said = Command::new("promtool").args(["query", "instant", "-o", "json", server, query]).output().unwrap();
    let values: Value = serde_json::from_slice(&said.stdout).unwrap_or(Value::Null);
    values.as_array().map_or(0, Vec::len)
}

/// Draws each dashboard's panels over the last minute into `FOLDER/NAME.png`, by gnuplot: what Grafana would have to show.
fn draw(server: &str, folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    for file in ["overview", "topic"] {
        let panels: Vec<(String, String)> =
            queries().into_iter().filter(|(at, _)| at.starts_with(&format!("{file}: "))).collect();
        let rows = panels.len().div_ceil(3);
        let picture = folder.join(format!("{file}.png"));
        let mut script = format!(
            "set terminal pngcairo size 1500,{} font 'sans,9'\nset output '{}'\nset multiplot layout {rows},3\n\
             set xdata time\nset timefmt '%s'\nset format x '%M:%S'\nset yrange [0:*]\nset offsets 0,0,graph 0.1,0\nset key bottom left samplen 1\n",
            rows * 260,
            picture.display()
        );
        for (at, (title, query)) in panels.iter().enumerate() {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
            let (start, end) = ((now - 60).to_string(), now.to_string());
            let said = Command::new("promtool")
                .args(["query", "range", "-o", "json", "--step=2s", "--start", &start, "--end", &end, server, query])
                .output()
                .unwrap();
            let series: Value = serde_json::from_slice(&said.stdout).unwrap_or(Value::Null);
            let mut plots = Vec::new();
            for (n, one) in series.as_array().into_iter().flatten().take(6).enumerate() {
                let labels = one["metric"].as_object().into_iter().flatten();
                let label: Vec<&str> = labels
                    .filter(|(k, _)| !["__name__", "job", "instance", "namespace", "container"].contains(&k.as_str()))
                    .filter_map(|(_, v)| v.as_str())
                    .collect();
                let points = one["values"].as_array().into_iter().flatten();
                let points: Vec<String> =
                    points.map(|p| format!("{} {}", p[0], p[1].as_str().unwrap_or("0"))).collect();
                script += &format!("$d{at}_{n} << EOD\n{}\nEOD\n", points.join("\n"));
                plots.push(format!("$d{at}_{n} using 1:2 with lines title \"{}\" noenhanced", label.join(" ")));
            }
            let title = title.replace('"', "");
            script += &format!("set title \"{title}\" noenhanced\nplot {}\n", plots.join(", "));
        }
        std::fs::write(folder.join(format!("{file}.gp")), script).unwrap();
        let drawn = Command::new("gnuplot").arg(folder.join(format!("{file}.gp"))).status().expect("gnuplot");
        assert!(drawn.success(), "gnuplot could not draw {file}");
    }
}

#[test]
#[ignore = "needs Prometheus: make e2e"]
fn every_panel_and_rule_gives_data() {
    let folder = std::env::temp_dir().join(format!("weir-dashboards-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let rules = Command::new("promtool")
        .args(["check", "rules"])
        .arg(weir_e2e::repository().join("charts/weir/rules.yaml"))
        .output()
        .unwrap();
    assert!(rules.status.success(), "{}", String::from_utf8_lossy(&rules.stderr));
    let cases = weir_e2e::repository().join("charts/weir/rules_test.yaml");
    let tested = Command::new("promtool").args(["test", "rules"]).arg(cases).output().unwrap();
    assert!(tested.status.success(), "{}", String::from_utf8_lossy(&tested.stdout));
    let mut serve = Command::new(weir());
    serve.args(["serve", "--listen", "127.0.0.1:0", "-o", "json", "--brokers", "3", "--manifests"]);
    serve.arg(weir_e2e::repository().join("examples")).arg("--data").arg(folder.join("data"));
    let mut serve = Running(serve.stdout(Stdio::piped()).env("WEIR_LOG", "warn").spawn().unwrap());
    let mut line = String::new();
    BufReader::new(serve.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let said: Value = serde_json::from_str(&line).unwrap();
    let brokers = said["brokers"].as_array().unwrap();
    let target = |b: &Value| {
        let (at, name) = (b["metrics"].as_str().unwrap(), b["name"].as_str().unwrap());
        format!(
            "{{targets: ['{at}'], labels: {{namespace: weir, pod: {name}, container: broker, weir_cluster: default}}}}"
        )
    };
    let targets: Vec<String> = brokers.iter().map(target).collect();
    let config = format!(
        "global: {{scrape_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n- job_name: weir\n  static_configs: [{}]\n",
        weir_e2e::repository().join("charts/weir/rules.yaml").display(),
        targets.join(", ")
    );
    std::fs::write(folder.join("prometheus.yml"), config).unwrap();
    let server = format!("http://127.0.0.1:{}", free_port());
    let mut prometheus = Command::new("prometheus");
    prometheus.arg(format!("--config.file={}", folder.join("prometheus.yml").display()));
    prometheus.arg(format!("--storage.tsdb.path={}", folder.join("tsdb").display()));
    prometheus.arg(format!("--web.listen-address={}", server.trim_start_matches("http://")));
    let _prometheus = Running(prometheus.stderr(Stdio::null()).spawn().unwrap());
    let client = brokers[0]["client"].as_str().unwrap().to_owned();
    let run = |arguments: &[&str]| {
        Command::new(weir())
            .args(["--server", &client])
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
    };
    // an address that refuses each message, and a dead-letter topic that does not exist: its dead letters stay
    let refused = format!(
        "apiVersion: weir.dev/v1alpha1\nkind: Subscription\nmetadata: {{name: refused}}\nspec:\n  topic: orders\n  mode: shared\n  filter: size >= 0\n  \
         push: {{endpoint: '{server}/refused'}}\n  deadLetter: {{maxDeliveries: 1, topic: nowhere}}\n"
    );
    std::fs::write(folder.join("refused.yaml"), refused).unwrap();
    let manifest = folder.join("refused.yaml").display().to_string();
    assert!(run(&["subscription", "apply", "-f", &manifest]).unwrap().success());
    let mut missing = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(90) {
        let _ = run(&["bench", "produce", "--topic", "orders", "--records", "2000", "--rate", "2000"]);
        let _ = run(&["bench", "consume", "--topic", "orders", "--records", "1000"]);
        let _ = run(&["consume", "--topic", "orders", "--from", "99999999999", "--max", "1"]); // refused, and counted
        missing = queries().into_iter().filter(|(_, query)| ask(&server, query) == 0).collect();
        if missing.is_empty() {
            break;
        }
    }
    if let Some(folder) = std::env::var_os("WEIR_PICTURES") {
        draw(&server, Path::new(&folder));
    }
    println!("{} queries asked; all gave data after {:.0} s", queries().len(), begun.elapsed().as_secs_f64());
    let _ = std::fs::remove_dir_all(&folder);
    assert!(missing.is_empty(), "no data for {missing:#?}");
}
