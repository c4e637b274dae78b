//! `prepare`, `survey` and the preparation that `migrate` begins with, against agents in this
//! process.

#![expect(clippy::unwrap_used, reason = "a failed set-up must stop the test")]

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use agent::api::fake::{FakeHost, Preparing, Script};
use agent::api::testing::{TIMEOUT, TestAgent, plan};
use agent::types::{GroupStatus, Phase, Scope};

struct Bench {
    a: TestAgent,
    b: TestAgent,
}

impl Bench {
    async fn new(preparing: Preparing) -> Self {
        let vms = [("web", Script::Moves), ("db", Script::Moves)];
        let a = TestAgent::start(FakeHost::new(vms, 1 << 40), None).await;
        let b = TestAgent::start(FakeHost::new([], 1 << 40), None).await;
        a.host.set_preparing(preparing);
        Self { a, b }
    }

    fn plan_file(&self) -> PathBuf {
        let mut plan = plan(&self.a, &self.b, &[("web", "a", "b"), ("db", "a", "b")]);
        plan.scope = Some(Scope::Rack);
        let path = self.a.dir().join("plan.toml");
        std::fs::write(&path, toml::to_string(&plan).unwrap()).unwrap();
        path
    }

    /// `gangway VERB PLAN FLAGS`
    fn spawn(&self, verb: &str, flags: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gangway"));
        command.arg("--socket").arg(self.a.socket()).arg(verb);
        command.arg(self.plan_file()).args(flags);
        let piped = command.stdin(Stdio::null()).stdout(Stdio::piped());
        piped.stderr(Stdio::piped()).spawn().unwrap()
    }

    async fn run(&self, verb: &str, flags: &[&str]) -> Outcome {
        finish(self.spawn(verb, flags)).await
    }

    async fn until(&self, holds: impl AsyncFn(&Self) -> bool) {
        let wait = async {
            while !holds(self).await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(TIMEOUT, wait).await.unwrap();
    }
}

#[derive(Debug)]
struct Outcome {
    code: Option<i32>,
    out: String,
    err: String,
}

async fn finish(child: Child) -> Outcome {
    let wait = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    let ended = tokio::time::timeout(Duration::from_secs(60), wait).await;
    let Output {
        status,
        stdout,
        stderr,
    } = ended.unwrap().unwrap();
    Outcome {
        code: status.code(),
        out: String::from_utf8(stdout).unwrap(),
        err: String::from_utf8(stderr).unwrap(),
    }
}

#[tokio::test]
async fn what_was_prepared_is_taken_over_by_the_migration_of_the_same_moves() {
    let bench = Bench::new(Preparing::Works).await;
    let prepared = bench
        .run("prepare", &["--cpu-percent", "20", "--read-rate", "5M"])
        .await;
    assert_eq!(prepared.code, Some(0), "{prepared:?}");
    let rack = prepared.out.lines().find(|line| line.starts_with("rack"));
    assert!(rack.unwrap().contains("66 %"), "{prepared:?}");
    let asked = bench.a.host.prepared();
    assert_eq!(asked[0].bounds.cpu_percent, 20);
    assert_eq!(asked[0].bounds.read_bytes_per_s, 5_000_000);
    assert_eq!(bench.a.host.preparations(), [asked[0].group.clone()]);

    let moved = bench.run("migrate", &[]).await;
    assert_eq!(moved.code, Some(0), "{moved:?}");
    let asked = bench.a.host.prepared();
    assert_eq!(asked.len(), 2);
    assert_eq!(asked[0].group, asked[1].group);
    assert_eq!(asked[0].vms, asked[1].vms, "the secrets stay the same");
    // Agents forget it with the group's end.
    bench
        .until(async |bench| bench.a.host.preparations().is_empty())
        .await;
}

#[tokio::test]
async fn a_migration_with_scope_rack_prepares_first_and_tells_programs_and_people() {
    let bench = Bench::new(Preparing::Works).await;
    let moved = bench.run("migrate", &[]).await;
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert!(moved.err.contains("prepared in "), "{moved:?}");
    assert_eq!(bench.a.host.prepared().len(), 1);

    let bench = Bench::new(Preparing::Works).await;
    let moved = bench.run("migrate", &["--json"]).await;
    let lines = moved
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let lines: Vec<serde_json::Value> = lines.collect();
    let prepared = lines.iter().position(|line| line["event"] == "prepared");
    let prepared = prepared.expect("an event of its own");
    assert_eq!(lines[prepared]["pages"]["distinct"], 100);
    assert!(lines[prepared]["seconds"].as_f64().unwrap() > 0.0);
    let began = lines.iter().position(|line| line["phase"] == "preparing");
    assert!(prepared < began.unwrap(), "{lines:?}");
}

#[tokio::test]
async fn no_prepare_and_other_scopes_prepare_nothing() {
    let bench = Bench::new(Preparing::Works).await;
    let moved = bench.run("migrate", &["--no-prepare"]).await;
    assert_eq!(moved.code, Some(0), "{moved:?}");
    let bench = Bench::new(Preparing::Works).await;
    let moved = bench.run("migrate", &["--scope", "host"]).await;
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert!(bench.a.host.prepared().is_empty());
}

#[tokio::test]
async fn a_preparation_that_fails_costs_only_savings() {
    let bench = Bench::new(Preparing::Fails).await;
    let moved = bench.run("migrate", &[]).await;
    assert_eq!(moved.code, Some(0), "{moved:?}");
    let note = "moves without its preparation: host `a`: its memory cannot be read";
    assert!(moved.err.contains(note), "{moved:?}");
    // Asked for by itself, a failure is one.
    let bench = Bench::new(Preparing::Fails).await;
    let prepared = bench.run("prepare", &[]).await;
    assert_eq!(prepared.code, Some(1), "{prepared:?}");
}

#[tokio::test]
async fn moves_wait_queued_during_preparation_and_cancelling_ends_both() {
    let bench = Bench::new(Preparing::NeverEnds).await;
    let migrating = bench.spawn("migrate", &[]);
    let hashing = async |bench: &Bench| {
        let groups: Vec<GroupStatus> = bench.a.client().get("/v1/groups").await.unwrap();
        let waits = |group: &GroupStatus| {
            let mut moves = group.moves.iter().map(|one| &one.status);
            moves.all(|one| one.phase == Phase::Queued && one.message.contains("hashed, 25 %"))
        };
        groups.last().is_some_and(waits)
    };
    bench.until(hashing).await;
    let group = bench.a.host.preparations().remove(0);
    let path = format!("/v1/groups/{group}/cancel");
    let (client, all) = (bench.a.client(), serde_json::json!({}));
    let report: serde_json::Value = client.post(&path, &all).await.unwrap();
    assert_eq!(report["done"].as_array().unwrap().len(), 2);
    let ended = finish(migrating).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.out.contains("runs at the source"), "{ended:?}");
    bench
        .until(async |bench| bench.a.host.preparations().is_empty())
        .await;
    assert_eq!(bench.a.host.vms(), ["db", "web"]);
}

#[tokio::test]
async fn a_survey_shows_a_forecast_and_keeps_nothing() {
    let bench = Bench::new(Preparing::Works).await;
    let html = bench.a.dir().join("survey.html");
    let flags = ["--html", html.to_str().unwrap(), "--max-bandwidth", "1M"];
    let survey = bench.run("survey", &flags).await;
    assert_eq!(survey.code, Some(0), "{survey:?}");
    for technique in ["stock", "oc", "gang", "irlm", "gang+zstd", "full"] {
        assert!(
            survey.out.contains(&format!("\n{technique} ")),
            "{survey:?}"
        );
    }
    assert!(survey.out.contains(" s\n"), "{survey:?}");
    assert!(std::fs::read_to_string(html).unwrap().contains("<svg"));
    assert!(bench.a.host.preparations().is_empty());
    assert!(bench.a.host.prepared()[0].index.is_empty());

    let json = bench.run("survey", &["a", "--json"]).await;
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["hosts"][0]["host"], "a");
    assert_eq!(json["rack"]["content"], 300);
    let other = bench.run("survey", &["c"]).await;
    assert_eq!(other.code, Some(2), "{other:?}");
}

#[tokio::test]
async fn ctrl_c_ends_a_preparation() {
    let bench = Bench::new(Preparing::NeverEnds).await;
    let child = bench.spawn("prepare", &[]);
    bench
        .until(async |bench| !bench.a.host.preparations().is_empty())
        .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let ended = finish(child).await;
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(bench.a.host.preparations().is_empty());
}
