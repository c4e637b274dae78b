//! The real binary against agents in this process, around hosts in memory.

#![expect(clippy::unwrap_used, reason = "a failed set-up must stop the test")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use agent::api::fake::{FakeHost, Script, VM_BYTES};
use agent::api::testing::{TIMEOUT, TestAgent, plan};
use agent::types::{GroupStatus, Phase, Plan};

const MEMORY: u64 = 64 << 30;

/// Two agents, and the command line for the first.
struct Bench {
    a: TestAgent,
    b: TestAgent,
}

impl Bench {
    async fn new<const N: usize>(vms: [(&str, Script); N]) -> Self {
        Self::with_target_memory(vms, MEMORY).await
    }

    async fn with_target_memory<const N: usize>(vms: [(&str, Script); N], memory: u64) -> Self {
        let a = TestAgent::start(FakeHost::new(vms, MEMORY), None).await;
        let b = TestAgent::start(FakeHost::new([], memory), None).await;
        Self { a, b }
    }

    /// A plan file that moves these VMs from the first host to the second.
    fn plan_file(&self, vms: &[&str], change: impl FnOnce(&mut Plan)) -> PathBuf {
        let moves: Vec<_> = vms.iter().map(|&vm| (vm, "a", "b")).collect();
        let mut plan = plan(&self.a, &self.b, &moves);
        change(&mut plan);
        let path = self.a.dir().join("plan.toml");
        std::fs::write(&path, toml::to_string(&plan).unwrap()).unwrap();
        path
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gangway"));
        command
            .arg("--socket")
            .arg(self.a.socket())
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    async fn run(&self, arguments: &[&str]) -> Outcome {
        finish(self.spawn(arguments)).await
    }

    fn spawn(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    async fn migrate(&self, vms: &[&str], flags: &[&str]) -> Outcome {
        let plan = self.plan_file(vms, |_| {});
        let arguments = [&["migrate", plan.to_str().unwrap()], flags].concat();
        self.run(&arguments).await
    }

    async fn groups(&self) -> Vec<GroupStatus> {
        self.a.client().get("/v1/groups").await.unwrap()
    }

    async fn wait_for(&self, phase: Phase) {
        let wait = async {
            let reached = |group: &GroupStatus| group.moves.iter().all(|m| m.status.phase == phase);
            while !self.groups().await.last().is_some_and(reached) {
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
    let Output {
        status,
        stdout,
        stderr,
    } = tokio::time::timeout(Duration::from_secs(60), wait)
        .await
        .unwrap()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Outcome {
        code: status.code(),
        out: text(stdout),
        err: text(stderr),
    }
}

fn interrupt(child: &Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
}

#[tokio::test]
async fn exit_0_and_a_table_when_all_moved() {
    let bench = Bench::new([("web", Script::Moves), ("db", Script::Moves)]).await;
    let outcome = bench.migrate(&["web", "db"], &[]).await;
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let lines: Vec<_> = outcome.out.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(
        lines[0].starts_with("VM   outcome  time"),
        "{}",
        outcome.out
    );
    assert!(lines[1].starts_with("web  moved ") && lines[2].starts_with("db   moved "));
    assert!(
        lines[1].contains("67.1 MB") && lines[1].contains("75 %"),
        "{}",
        lines[1]
    );
    // Without a terminal a phase is a line, and nothing is redrawn.
    assert!(
        outcome.err.contains("web: switch-over: "),
        "{}",
        outcome.err
    );
    assert!(!outcome.err.contains('\x1b'), "{}", outcome.err);
}

#[tokio::test]
async fn exit_1_when_a_vm_stayed_and_4_when_one_needs_a_person() {
    let vms = [
        ("web", Script::Moves),
        ("stays", Script::Stays),
        ("lost", Script::NeedsPerson),
    ];
    let bench = Bench::new(vms).await;
    let outcome = bench.migrate(&["web", "stays"], &[]).await;
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.out.contains("stays  stayed") && outcome.out.contains("runs at the source"));
    let outcome = bench.migrate(&["stays", "lost"], &[]).await;
    assert_eq!(outcome.code, Some(4), "{outcome:?}");

    let recovered = bench.run(&["recover"]).await;
    assert_eq!(recovered.code, Some(0), "{recovered:?}");
    assert!(recovered.out.contains("lost: moved: "), "{recovered:?}");
    let nothing = bench.run(&["recover"]).await;
    assert_eq!(nothing.code, Some(3), "{nothing:?}");
    let recovered = bench
        .groups()
        .await
        .into_iter()
        .find(|group| group.moves[1].status.vm == "lost");
    let group = recovered.unwrap().group;
    let watched = bench.run(&["status", "--watch", &group]).await;
    assert_eq!(watched.code, Some(1), "how it ended at last: {watched:?}");
}

#[tokio::test]
async fn exit_2_with_the_place_when_the_plan_or_the_command_line_is_wrong() {
    let bench = Bench::new([("web", Script::Moves)]).await;
    let plan = bench.plan_file(&["web"], |_| {});
    let text = std::fs::read_to_string(&plan).unwrap();
    let name = plan.to_str().unwrap();
    std::fs::write(&plan, format!("bandwith = 1\n{text}")).unwrap();
    let outcome = bench.run(&["migrate", name]).await;
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.err.contains(&format!("{name}:1:1: ")) && outcome.err.contains("bandwith"));

    let twice = bench.migrate(&["web", "web"], &[]).await;
    assert_eq!(twice.code, Some(2), "{twice:?}");
    assert!(twice.err.contains("VM `web` has two moves"), "{twice:?}");

    let missing = bench.run(&["migrate", "/nonexistent/plan.toml"]).await;
    assert_eq!(missing.code, Some(2), "{missing:?}");
    assert!(missing.err.contains("/nonexistent/plan.toml") && missing.err.contains("No such file"));

    let preset = bench.run(&["migrate", name, "--preset", "warp"]).await;
    assert_eq!(preset.code, Some(2), "{preset:?}");
    let config = bench
        .run(&["agent", "--config", "/nonexistent/agent.toml"])
        .await;
    assert_eq!(config.code, Some(2), "{config:?}");
    assert!(bench.groups().await.is_empty());
}

#[tokio::test]
async fn exit_3_when_refused_before_starting() {
    let bench = Bench::with_target_memory(
        [("web", Script::Moves), ("db", Script::Moves)],
        2 * VM_BYTES - 1,
    )
    .await;
    let full = bench.migrate(&["web", "db"], &[]).await;
    assert_eq!(full.code, Some(3), "{full:?}");
    assert!(
        full.err.contains("host `b`") && full.err.contains("memory"),
        "{full:?}"
    );
    let unknown = bench.migrate(&["web", "ghost"], &[]).await;
    assert_eq!(unknown.code, Some(3), "{unknown:?}");
    assert!(unknown.err.contains("VM `ghost`"), "{unknown:?}");
    assert!(bench.groups().await.is_empty());

    let mut bench = bench;
    bench.a.kill().await;
    let nobody = bench.migrate(&["web"], &[]).await;
    assert_eq!(nobody.code, Some(3), "{nobody:?}");
    assert!(nobody.err.contains("control.sock"), "{nobody:?}");
}

#[tokio::test]
async fn json_is_one_object_a_line_and_the_last_has_the_outcomes() {
    let bench = Bench::new([("web", Script::Moves)]).await;
    let outcome = bench.migrate(&["web"], &["--json"]).await;
    assert_eq!((outcome.code, outcome.err.as_str()), (Some(0), ""));
    let lines: Vec<serde_json::Value> = outcome
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let events: Vec<_> = lines
        .iter()
        .filter_map(|line| line["event"].as_str())
        .collect();
    assert_eq!(events.len(), lines.len());
    assert!(events.contains(&"phase") && events.contains(&"progress"));
    let last = lines.last().unwrap();
    assert_eq!(last["event"], "group-finished");
    assert_eq!(last["outcomes"][0]["vm"], "web");
    assert_eq!(last["outcomes"][0]["phase"], "moved");
}

#[tokio::test]
async fn a_migration_outlives_its_command_and_is_picked_up_again() {
    let bench = Bench::new([("web", Script::NeverConverges)]).await;
    let plan = bench.plan_file(&["web"], |_| {});
    let mut child = bench.spawn(&["migrate", plan.to_str().unwrap()]);
    bench.wait_for(Phase::Bulk).await;
    child.kill().unwrap();
    child.wait().unwrap();

    let status = bench.run(&["status"]).await;
    assert!(
        status.out.contains("is under way") && status.out.contains("a -> b"),
        "{status:?}"
    );
    let watching = bench.spawn(&["status", "--watch"]);
    tokio::time::sleep(Duration::from_millis(300)).await;
    bench.a.host.converge();
    let outcome = finish(watching).await;
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.out.contains("web  moved"), "{outcome:?}");
    // Once more, of a group that has ended.
    let group = bench.groups().await.remove(0).group;
    assert_eq!(
        bench.run(&["status", "--watch", &group]).await.code,
        Some(0)
    );
    let idle = bench.run(&["status", "--watch"]).await;
    assert_eq!(idle.code, Some(0), "{idle:?}");
}

#[tokio::test]
async fn ctrl_c_leaves_the_migration_running_and_says_how_to_cancel() {
    let bench = Bench::new([("web", Script::NeverConverges)]).await;
    let plan = bench.plan_file(&["web"], |_| {});
    let child = bench.spawn(&["migrate", plan.to_str().unwrap()]);
    bench.wait_for(Phase::Bulk).await;
    // Its handler is in place once it watches, which is soon after the moves run.
    tokio::time::sleep(Duration::from_millis(500)).await;
    interrupt(&child);
    let outcome = finish(child).await;
    assert_eq!(outcome.code, Some(130), "{outcome:?}");
    let group = bench.groups().await.remove(0);
    assert!(!group.finished);
    assert!(
        outcome
            .err
            .contains(&format!("gangway cancel {}", group.group)),
        "{outcome:?}"
    );

    let watching = bench.spawn(&["status", "--watch"]);
    let cancelled = bench.run(&["cancel"]).await;
    assert_eq!(cancelled.code, Some(0), "{cancelled:?}");
    assert_eq!(cancelled.out, "web is being cancelled\n");
    bench.wait_for(Phase::Stayed).await;
    let watched = finish(watching).await;
    assert!(matches!(watched.code, Some(0 | 1)), "{watched:?}");
    let nothing = bench.run(&["cancel", &group.group]).await;
    assert_eq!(nothing.code, Some(3), "{nothing:?}");
}

#[tokio::test]
async fn a_cancelled_vm_is_exit_1_for_the_command_that_waits() {
    let bench = Bench::new([("web", Script::NeverConverges), ("db", Script::Moves)]).await;
    let plan = bench.plan_file(&["web", "db"], |_| {});
    let child = bench.spawn(&["migrate", plan.to_str().unwrap()]);
    let wait = async {
        while bench.run(&["cancel", "--vm", "web"]).await.code != Some(0) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, wait).await.unwrap();
    let outcome = finish(child).await;
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.out.contains("web  stayed") && outcome.out.contains("db   moved"));
}

#[tokio::test]
async fn a_detached_migration_names_its_group_and_a_held_vm_waits_for_continue() {
    let bench = Bench::new([("web", Script::Moves)]).await;
    let plan = bench.plan_file(&["web"], |plan| plan.confirm_handover = true);
    let detached = bench
        .run(&["migrate", plan.to_str().unwrap(), "--detach"])
        .await;
    assert_eq!(detached.code, Some(0), "{detached:?}");
    assert_eq!(detached.out.trim(), bench.groups().await[0].group);
    bench.wait_for(Phase::Held).await;
    let continued = bench.run(&["continue", "--json"]).await;
    assert_eq!(continued.out, "{\"done\":[\"web\"],\"refused\":[]}\n");
    bench.wait_for(Phase::Moved).await;
}

#[tokio::test]
async fn a_restart_of_the_agent_does_not_end_the_watching() {
    let on_b = [("web", Script::NeverConverges)];
    let mut bench = Bench::new([]).await;
    bench.b.replace_host(FakeHost::new(on_b, MEMORY)).await;
    bench.b.start_again().await.unwrap();
    let plan = bench.plan_file(&[], |plan| {
        let mut moves = agent::api::testing::plan(&bench.a, &bench.b, &[("web", "b", "a")]).moves;
        plan.moves.append(&mut moves);
    });
    let child = bench.spawn(&["migrate", plan.to_str().unwrap()]);
    bench.wait_for(Phase::Bulk).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    bench.a.kill().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    bench.a.start_again().await.unwrap();
    bench.b.host.converge();
    let outcome = finish(child).await;
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.err.contains("the migration goes on"), "{outcome:?}");
    assert!(
        outcome.err.contains("the agent answers again"),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn on_a_terminal_progress_is_redrawn_in_place() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let bench = Bench::new([("web", Script::NeverConverges)]).await;
    let plan = bench.plan_file(&["web"], |_| {});
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let slave = File::options()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    let mut command = bench.command(&["migrate", plan.to_str().unwrap()]);
    let child = command
        .stdout(Stdio::piped())
        .stderr(slave)
        .spawn()
        .unwrap();
    // Its copy of the terminal's end would keep it open.
    drop(command);
    let reader = tokio::task::spawn_blocking(move || {
        let (mut text, mut terminal) = (Vec::new(), File::from(terminal));
        let mut chunk = [0; 4096];
        // Ends with an error once the last writer has gone.
        while let Ok(count @ 1..) = terminal.read(&mut chunk) {
            text.extend_from_slice(&chunk[..count]);
        }
        String::from_utf8(text).unwrap()
    });
    bench.wait_for(Phase::Bulk).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    bench.a.host.converge();
    let outcome = finish(child).await;
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let text = reader.await.unwrap();
    assert!(
        text.contains("\x1b[2A\x1b[J"),
        "two lines are replaced: {text}"
    );
    assert!(
        text.contains("web    bulk") && text.contains("total  1 of 1 ended"),
        "{text}"
    );
    assert!(outcome.out.contains("web  moved"), "{outcome:?}");
}

#[tokio::test]
async fn completions_man_pages_and_doctor_are_there() {
    let bench = Bench::new([]).await;
    let completions = bench.run(&["completions", "bash"]).await;
    assert!(completions.out.contains("max-bandwidth"), "{completions:?}");
    let page = bench.run(&["man"]).await;
    assert!(page.out.contains(".TH gangway") && page.out.contains("needs a person"));
    let dir = bench.a.dir().join("man");
    let pages = bench.run(&["man", "--dir", dir.to_str().unwrap()]).await;
    assert_eq!(pages.code, Some(0), "{pages:?}");
    assert!(dir.join("gangway-migrate.1").exists() && dir.join("gangway-index.1").exists());

    let doctor = bench.run(&["doctor"]).await;
    assert!(doctor.out.contains("memory: "), "{doctor:?}");
    assert!(!doctor.out.contains("control.sock"), "{doctor:?}");
    let mut bench = bench;
    bench.a.kill().await;
    let alone = bench.run(&["doctor", "--json"]).await;
    assert_eq!(alone.code, Some(1), "{alone:?}");
    let report: serde_json::Value = serde_json::from_str(&alone.out).unwrap();
    assert_eq!(report["findings"][0]["about"], "agent");
}

#[tokio::test]
async fn a_socket_that_nothing_would_use_is_refused() {
    let bench = Bench::new([]).await;
    for command in ["agent", "index"] {
        let outcome = bench.run(&[command, "--config", "agent.toml"]).await;
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        assert!(outcome.err.contains("--socket"), "{outcome:?}");
    }
}

/// Two hosts with names, the first with VMs.
async fn two_named<const N: usize>(vms: [(&str, Script); N], memory: u64) -> Bench {
    let a = FakeHost::new(vms, MEMORY).with_name("a");
    let b = FakeHost::new([], memory).with_name("b");
    Bench {
        a: TestAgent::start(a, None).await,
        b: TestAgent::start(b, None).await,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn evacuate_moves_every_vm_of_a_host() {
    let bench = two_named([("v1", Script::Moves), ("v2", Script::Moves)], MEMORY).await;
    let (from, to) = (bench.a.addresses().control, bench.b.addresses().control);
    let outcome = bench.run(&["evacuate", &from, "--to", &to]).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    let groups = bench.groups().await;
    let moved = groups.iter().flat_map(|group| &group.moves);
    assert_eq!(moved.filter(|m| m.status.phase == Phase::Moved).count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plan_of_an_evacuation_is_printed_and_can_be_migrated() {
    let bench = two_named([("v1", Script::Moves)], MEMORY).await;
    let (from, to) = (bench.a.addresses().control, bench.b.addresses().control);
    let arguments = ["evacuate", &from, "--to", &to, "--plan", "--preset", "oc"];
    let outcome = bench.run(&arguments).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    assert!(bench.groups().await.is_empty(), "nothing was started");
    let path = bench.a.dir().join("evacuation.toml");
    std::fs::write(&path, &outcome.out).unwrap();
    let plan = Plan::load(&path).unwrap();
    assert_eq!((plan.moves.len(), &*plan.moves[0].vm), (1, "v1"));
    assert_eq!(plan.preset, Some(agent::types::Preset::Oc));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evacuation_that_does_not_fit_starts_nothing() {
    let bench = two_named([("v1", Script::Moves)], VM_BYTES - 1).await;
    let (from, to) = (bench.a.addresses().control, bench.b.addresses().control);
    let outcome = bench.run(&["evacuate", &from, "--to", &to]).await;
    assert_eq!(outcome.code, Some(3), "{}", outcome.err);
    assert!(outcome.err.contains("v1"), "{}", outcome.err);
    assert!(bench.groups().await.is_empty());
}

#[tokio::test]
async fn a_recovery_that_is_refused_in_part_is_waited_for_and_exits_4() {
    let mut bench = Bench::new([("here", Script::NeedsPerson)]).await;
    let on_b = [("there", Script::NeedsPerson)];
    bench.b.replace_host(FakeHost::new(on_b, MEMORY)).await;
    bench.b.start_again().await.unwrap();
    let plan = bench.plan_file(&["here"], |plan| {
        let other = agent::api::testing::plan(&bench.a, &bench.b, &[("there", "b", "a")]);
        plan.moves.extend(other.moves);
    });
    let lost = bench.run(&["migrate", plan.to_str().unwrap()]).await;
    assert_eq!(lost.code, Some(4), "{lost:?}");
    bench.b.kill().await;
    let recovered = bench.run(&["recover"]).await;
    assert_eq!(recovered.code, Some(4), "{recovered:?}");
    assert!(recovered.out.contains("here: moved: "), "{recovered:?}");
    assert!(recovered.err.contains("VM `there`"), "{recovered:?}");
}

#[tokio::test]
async fn a_vm_that_cannot_be_cancelled_any_more_is_named_with_where_it_is() {
    let bench = Bench::new([("web", Script::Moves)]).await;
    assert_eq!(bench.migrate(&["web"], &[]).await.code, Some(0));
    let late = bench.run(&["cancel", "--vm", "web"]).await;
    assert_eq!(late.code, Some(3), "{late:?}");
    assert!(late.err.contains("VM `web` runs at the target"), "{late:?}");
    let unknown = bench.run(&["cancel", "--vm", "ghost"]).await;
    assert_eq!(unknown.code, Some(3), "{unknown:?}");
    assert!(unknown.err.contains("VM `ghost`"), "{unknown:?}");
}

#[tokio::test]
async fn whoever_reads_the_events_may_have_enough_of_them() {
    let bench = Bench::new([("web", Script::NeverConverges)]).await;
    let plan = bench.plan_file(&["web"], |_| {});
    let mut child = bench.spawn(&["migrate", plan.to_str().unwrap(), "--json"]);
    let mut reader = child.stdout.take().unwrap();
    let read = tokio::task::spawn_blocking(move || reader.read_exact(&mut [0]).unwrap());
    read.await.unwrap();
    let outcome = finish(child).await;
    assert_eq!(outcome.code, Some(130), "{outcome:?}");
    assert_eq!(outcome.err, "");
    assert!(!bench.groups().await[0].finished);
}

/// Answers like an agent: to each request by the beginning of its first line, in this order, the last
/// one again and again. An empty answer, or none, cuts the connection.
fn stand_in(bench: &Bench, mut answers: Vec<(&'static str, String)>) -> PathBuf {
    let socket = bench.a.dir().join("stand-in.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let request = read_request(&mut stream);
            let fits = |(line, _): &(&str, String)| request.starts_with(line);
            let Some(at) = answers.iter().position(fits) else {
                continue;
            };
            let body = answers[at].1.clone();
            if answers[at + 1..].iter().any(fits) {
                answers.remove(at);
            }
            let status = if body.contains("unknown-group") {
                "404 Not Found"
            } else {
                "200 OK"
            };
            let length = body.len();
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}");
            if !body.is_empty() {
                stream.write_all(answer.as_bytes()).unwrap();
            }
        }
    });
    socket
}

fn read_request(stream: &mut UnixStream) -> String {
    let mut request = String::new();
    let mut chunk = [0; 4096];
    loop {
        let count = stream.read(&mut chunk).unwrap();
        request += std::str::from_utf8(&chunk[..count]).unwrap();
        let length = |head: &str| -> Option<usize> {
            let head = head.to_ascii_lowercase();
            let (_, length) = head.split_once("content-length: ")?;
            length.lines().next()?.parse().ok()
        };
        let is_whole = request
            .split_once("\r\n\r\n")
            .is_some_and(|(head, body)| body.len() >= length(head).unwrap_or(0));
        if is_whole || count == 0 {
            return request;
        }
    }
}

async fn run_at(socket: &Path, arguments: &[&str]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gangway"));
    command.arg("--socket").arg(socket).args(arguments);
    let piped = command.stdin(Stdio::null()).stdout(Stdio::piped());
    finish(piped.stderr(Stdio::piped()).spawn().unwrap()).await
}

#[tokio::test]
async fn exit_4_when_a_migration_may_have_been_started() {
    let bench = Bench::new([("web", Script::Moves)]).await;
    let plan = bench.plan_file(&["web"], |_| {});
    let socket = stand_in(&bench, Vec::new());
    let outcome = run_at(&socket, &["migrate", plan.to_str().unwrap()]).await;
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    assert!(outcome.err.contains("may have been started"), "{outcome:?}");
}

#[tokio::test]
async fn a_recovery_outlives_a_cut_connection_and_a_vm_that_is_gone_is_exit_4() {
    let report = |vms: &[&str]| serde_json::json!({ "done": vms, "refused": [] }).to_string();
    let web = serde_json::json!({
        "id": "g/web", "group": "g", "vm": "web", "target": "b", "phase": "moved", "message": "there",
        "progress": agent::types::Progress::default(),
        "source": "a", "reachable": true, "elapsed_s": 1.0,
    });
    let status = serde_json::json!({
        "group": "g", "accepted_unix_ms": 0.0, "finished": true, "moves": [web],
    });
    let bench = Bench::new([]).await;
    // Nothing else of the agent is asked for than of this group.
    let answers = vec![
        ("POST /v1/groups/g/recover ", report(&["web"])),
        ("GET /v1/groups/g ", String::new()),
        ("GET /v1/groups/g ", status.to_string()),
    ];
    let socket = stand_in(&bench, answers);
    let outcome = run_at(&socket, &["recover", "g"]).await;
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.out.contains("web: moved: there"), "{outcome:?}");

    std::fs::remove_file(&socket).unwrap();
    let unknown = serde_json::json!({ "code": "unknown-group", "message": "no such group" });
    let answers = vec![
        ("POST /v1/groups/g/recover ", report(&["web"])),
        ("GET /v1/groups/g ", unknown.to_string()),
        ("GET /v1/moves ", "[]".to_owned()),
    ];
    let socket = stand_in(&bench, answers);
    let outcome = run_at(&socket, &["recover", "g"]).await;
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    assert!(outcome.err.contains("of web is not known"), "{outcome:?}");
}
