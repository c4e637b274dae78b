//! Groups over two real agents around hosts in memory.

mod actions;
mod restarts;

use std::time::Duration;

use crate::api::fake::{FakeHost, Script, VM_BYTES};
use crate::api::mover::{Refusal, RefusalCode};
use crate::api::testing::{TIMEOUT, TestAgent, plan, write_certificates};
use crate::client::{CallError, Client};
use crate::types::{
    ActionReport, GroupAccepted, GroupEvent, GroupFinished, GroupRequest, GroupStatus, Mode,
    MoveStatus, Phase, Plan, Selection,
};

const MEMORY: u64 = 64 << 30;

async fn pair(a: &[(&str, Script)], b: &[(&str, Script)]) -> (TestAgent, TestAgent) {
    let host = |vms: &[(&str, Script)]| FakeHost::new(vms.iter().copied(), MEMORY);
    (
        TestAgent::start(host(a), None).await,
        TestAgent::start(host(b), None).await,
    )
}

async fn accept(client: &Client, plan: Plan) -> Result<String, CallError> {
    let request = GroupRequest {
        plan,
        id: Some("g".to_owned()),
    };
    let accepted: GroupAccepted = client.post("/v1/groups", &request).await?;
    Ok(accepted.group)
}

async fn refused(client: &Client, plan: Plan) -> Refusal {
    match accept(client, plan).await.unwrap_err() {
        CallError::Refused(refusal) => refusal,
        other => panic!("expected a refusal, got {other}"),
    }
}

async fn finished(client: &Client) -> GroupFinished {
    let follow = async {
        let mut stream = client.events("/v1/groups/g/events", 0).await.unwrap();
        let mut next = 0;
        while let Some(event) = stream.next::<GroupEvent>().await.unwrap() {
            assert!(event.seq() >= next, "numbers of a group's events grow");
            next = event.seq() + 1;
            if let GroupEvent::Finished(finished) = event {
                return finished;
            }
        }
        panic!("the stream ended without the group's end");
    };
    tokio::time::timeout(TIMEOUT * 4, follow).await.unwrap()
}

fn outcomes(finished: &GroupFinished) -> Vec<(&str, Phase)> {
    let outcome = |one: &crate::types::GroupMove| one.status.phase;
    finished
        .outcomes
        .iter()
        .map(|one| (one.status.vm.as_str(), outcome(one)))
        .collect()
}

async fn wait_for(client: &Client, what: impl Fn(&GroupStatus) -> bool) {
    let wait = async {
        while !what(&client.get("/v1/groups/g").await.unwrap()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(TIMEOUT * 2, wait).await.unwrap();
}

#[tokio::test]
async fn a_group_moves_in_both_directions_over_mutual_tls() {
    let certificates = tempfile::tempdir().unwrap();
    write_certificates(certificates.path(), &["127.0.0.1"]);
    let tls = Some(certificates.path());
    let on_a = [("web", Script::Moves), ("db", Script::Moves)];
    let a = TestAgent::start(FakeHost::new(on_a, MEMORY), tls).await;
    let b = TestAgent::start(FakeHost::new([("mail", Script::Moves)], MEMORY), tls).await;
    let plan = plan(
        &a,
        &b,
        &[("web", "a", "b"), ("mail", "b", "a"), ("db", "a", "b")],
    );
    assert_eq!(accept(&a.client(), plan).await.unwrap(), "g");
    let finished = finished(&a.client()).await;
    let moved = [
        ("web", Phase::Moved),
        ("mail", Phase::Moved),
        ("db", Phase::Moved),
    ];
    assert_eq!(outcomes(&finished), moved);
    let sources: Vec<_> = finished
        .outcomes
        .iter()
        .map(|one| one.source.as_str())
        .collect();
    assert_eq!(sources, ["a", "b", "a"]);
    // Each target was asked for all that comes to it together, and once more after the preparation.
    let admitted = b.host.admitted();
    assert_eq!(admitted.len(), 2);
    for admission in admitted {
        assert_eq!(admission.memory_bytes(), 2 * VM_BYTES);
    }
}

#[tokio::test]
async fn whatever_an_agent_refuses_nothing_starts() {
    let on_a = [("web", Script::Moves), ("pinned", Script::CannotMigrate)];
    let (a, b) = pair(&on_a, &[]).await;
    let small = TestAgent::start(FakeHost::new([], VM_BYTES), None).await;
    let client = a.client();

    let two = [("web", "a", "b"), ("ghost", "a", "b")];
    let ghost = refused(&client, plan(&a, &b, &two)).await;
    assert_eq!(
        (ghost.code, ghost.vm.as_deref()),
        (RefusalCode::UnknownVm, Some("ghost"))
    );
    assert!(ghost.message.contains("host `a`") && ghost.message.contains("nothing was started"));

    let two = [("web", "a", "b"), ("pinned", "a", "b")];
    let pinned = refused(&client, plan(&a, &b, &two)).await;
    assert_eq!(pinned.code, RefusalCode::CannotMigrate);

    let on_a = [("web", Script::Moves), ("db", Script::Moves)];
    let full = TestAgent::start(FakeHost::new(on_a, MEMORY), None).await;
    let two = [("web", "a", "b"), ("db", "a", "b")];
    let too_small = refused(&full.client(), plan(&full, &small, &two)).await;
    assert_eq!(too_small.code, RefusalCode::NoMemory);
    assert!(too_small.message.contains("host `b`"), "{too_small}");

    let same = refused(&client, plan(&a, &b, &[("web", "a", "a")])).await;
    assert_eq!(same.code, RefusalCode::BadRequest);

    let mut gone = plan(&a, &b, &[("web", "a", "b")]);
    if let Some(host) = gone.hosts.get_mut("b") {
        host.control = "127.0.0.1:1".to_owned();
    }
    let gone = refused(&client, gone).await;
    assert_eq!(gone.code, RefusalCode::Unreachable);
    assert!(gone.message.contains("127.0.0.1:1"), "{gone}");

    for agent in [&a, &b, &full, &small] {
        let client = agent.client();
        assert!(
            client
                .get::<Vec<MoveStatus>>("/v1/moves")
                .await
                .unwrap()
                .is_empty()
        );
        assert!(
            client
                .get::<Vec<GroupStatus>>("/v1/groups")
                .await
                .unwrap()
                .is_empty()
        );
    }
}

#[tokio::test]
async fn one_vm_or_all_are_cancelled_and_the_others_go_on() {
    let on_a = [
        ("slow", Script::NeverConverges),
        ("slower", Script::NeverConverges),
    ];
    let (a, b) = pair(&on_a, &[("web", Script::Moves)]).await;
    let moves = [("slow", "a", "b"), ("web", "b", "a"), ("slower", "a", "b")];
    let client = b.client();
    accept(&client, plan(&a, &b, &moves)).await.unwrap();
    wait_for(&client, |group| group.moves[0].status.phase == Phase::Bulk).await;

    let one = Selection {
        vm: Some("slow".to_owned()),
    };
    let report: ActionReport = client.post("/v1/groups/g/cancel", &one).await.unwrap();
    assert_eq!(
        (report.done, report.refused),
        (vec!["slow".to_owned()], vec![])
    );
    wait_for(&client, |group| {
        group.moves[0].status.phase == Phase::Stayed
    })
    .await;
    wait_for(&client, |group| group.moves[1].status.phase == Phase::Moved).await;
    wait_for(&client, |group| group.moves[2].status.phase == Phase::Bulk).await;
    assert!(
        !client
            .get::<GroupStatus>("/v1/groups/g")
            .await
            .unwrap()
            .finished
    );

    let all = Selection::default();
    let report: ActionReport = client.post("/v1/groups/g/cancel", &all).await.unwrap();
    assert_eq!(report.done, ["slower"]);
    let ended = finished(&client).await;
    let expected = [
        ("slow", Phase::Stayed),
        ("web", Phase::Moved),
        ("slower", Phase::Stayed),
    ];
    assert_eq!(outcomes(&ended), expected);
    let unknown = Selection {
        vm: Some("nobody".to_owned()),
    };
    let answer = client
        .post::<_, ActionReport>("/v1/groups/g/cancel", &unknown)
        .await;
    assert_eq!(
        answer.unwrap_err().refused_as(),
        Some(RefusalCode::UnknownVm)
    );
}

#[tokio::test]
async fn held_vms_wait_for_continue() {
    let (a, b) = pair(&[("web", Script::Moves)], &[]).await;
    let client = b.client();
    let held = Plan {
        confirm_handover: true,
        ..plan(&a, &b, &[("web", "a", "b")])
    };
    accept(&client, held).await.unwrap();
    wait_for(&client, |group| group.moves[0].status.phase == Phase::Held).await;
    let all = Selection::default();
    let report: ActionReport = client.post("/v1/groups/g/continue", &all).await.unwrap();
    assert_eq!(report.done, ["web"]);
    assert_eq!(outcomes(&finished(&client).await), [("web", Phase::Moved)]);
}

#[tokio::test]
async fn a_move_that_is_not_hybrid_does_not_go_over_on_command() {
    let (a, b) = pair(&[("web", Script::NeverConverges)], &[]).await;
    let client = b.client();
    let all = Selection::default();
    let order = || client.post::<_, ActionReport>("/v1/groups/g/postcopy", &all);
    let copies = |group: &GroupStatus| group.moves[0].status.phase == Phase::Bulk;
    accept(&client, plan(&a, &b, &[("web", "a", "b")]))
        .await
        .unwrap();
    wait_for(&client, copies).await;
    let report = order().await.unwrap();
    assert_eq!(report.refused[0].code, RefusalCode::NotHybrid);
    let _: ActionReport = client.post("/v1/groups/g/cancel", &all).await.unwrap();
    assert_eq!(outcomes(&finished(&client).await), [("web", Phase::Stayed)]);
    assert_eq!(
        order().await.unwrap_err().refused_as(),
        Some(RefusalCode::TooLate)
    );
}

#[tokio::test]
async fn a_hybrid_move_that_would_never_converge_moves_when_it_is_told_to_go_over() {
    let (a, b) = pair(&[("web", Script::NeverConverges)], &[]).await;
    let client = b.client();
    let hybrid = Plan {
        mode: Some(Mode::Hybrid),
        ..plan(&a, &b, &[("web", "a", "b")])
    };
    accept(&client, hybrid).await.unwrap();
    wait_for(&client, |group| group.moves[0].status.phase == Phase::Bulk).await;
    let all = Selection::default();
    let report: ActionReport = client.post("/v1/groups/g/postcopy", &all).await.unwrap();
    assert_eq!(report.done, ["web"]);
    assert_eq!(outcomes(&finished(&client).await), [("web", Phase::Moved)]);
}

#[tokio::test]
async fn the_budget_of_ended_moves_goes_to_those_that_remain() {
    let on_b = [
        ("quick", Script::NeverConverges),
        ("slow", Script::NeverConverges),
    ];
    let (a, b) = pair(&[("web", Script::NeverConverges)], &on_b).await;
    let moves = [("web", "a", "b"), ("quick", "b", "a"), ("slow", "b", "a")];
    let budget = 3 << 20;
    let plan = Plan {
        max_bandwidth_bytes_per_s: Some(budget),
        ..plan(&a, &b, &moves)
    };
    let client = a.client();
    accept(&client, plan).await.unwrap();
    wait_for(&client, |group| {
        group
            .moves
            .iter()
            .all(|one| one.status.phase == Phase::Bulk)
    })
    .await;
    assert!(
        a.host.limits().is_empty(),
        "the first shares come with the moves"
    );

    let quick = Selection {
        vm: Some("quick".to_owned()),
    };
    client
        .post::<_, ActionReport>("/v1/groups/g/cancel", &quick)
        .await
        .unwrap();
    let share = |agent: &TestAgent| agent.host.limits().last()?.1.group_bytes_per_s;
    let wait = async {
        while share(&a) != Some(budget / 2) || share(&b) != Some(budget / 2) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, wait).await.unwrap();

    b.host.converge();
    let wait = async {
        while share(&a) != Some(budget) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, wait).await.unwrap();
    a.host.converge();
    let ended = finished(&client).await;
    let expected = [
        ("web", Phase::Moved),
        ("quick", Phase::Stayed),
        ("slow", Phase::Moved),
    ];
    assert_eq!(outcomes(&ended), expected);
}

#[tokio::test]
async fn an_unreachable_agent_fails_no_move() {
    let (mut a, b) = pair(&[("web", Script::NeverConverges)], &[]).await;
    let client = b.client();
    accept(&client, plan(&a, &b, &[("web", "a", "b")]))
        .await
        .unwrap();
    wait_for(&client, |group| group.moves[0].status.phase == Phase::Bulk).await;
    let interrupted = crate::types::MoveSpec {
        id: "g/web".to_owned(),
        ..plan(&a, &b, &[("web", "a", "b")])
            .specs("g", &[("default".to_owned(), "00".repeat(32))].into())
            .remove(0)
    };
    a.kill().await;
    wait_for(&client, |group| !group.moves[0].reachable).await;
    let status: GroupStatus = client.get("/v1/groups/g").await.unwrap();
    assert!(!status.finished && status.moves[0].status.phase == Phase::Bulk);

    // The agent comes back, finds the move in its journal, and its events count from 0 again.
    a.replace_host(FakeHost::new([], MEMORY).with_interrupted(vec![interrupted]))
        .await;
    a.start_again().await.unwrap();
    let ended = finished(&client).await;
    assert_eq!(outcomes(&ended), [("web", Phase::Moved)]);
    assert!(ended.outcomes[0].reachable);
}

#[tokio::test]
async fn a_source_agent_that_forgot_the_move_is_asked_where_the_vm_is() {
    let on_a = [
        ("left", Script::NeverConverges),
        ("vanished", Script::NeverConverges),
    ];
    let (mut a, b) = pair(&on_a, &[]).await;
    let client = b.client();
    let moves = [("left", "a", "b"), ("vanished", "a", "b")];
    accept(&client, plan(&a, &b, &moves)).await.unwrap();
    wait_for(&client, |group| {
        group
            .moves
            .iter()
            .all(|one| one.status.phase == Phase::Bulk)
    })
    .await;
    a.replace_host(FakeHost::new([("left", Script::Moves)], MEMORY))
        .await;
    a.start_again().await.unwrap();
    let ended = finished(&client).await;
    assert_eq!(
        outcomes(&ended),
        [("left", Phase::Stayed), ("vanished", Phase::NeedsPerson)]
    );
    let message = &ended.outcomes[1].status.message;
    assert!(
        message.contains("VM `vanished`") && message.contains("host `b`"),
        "{message}"
    );
}

#[tokio::test]
async fn the_coordinators_death_stops_no_move_and_its_restart_follows_them_again() {
    let (a, mut b) = pair(&[("web", Script::NeverConverges)], &[]).await;
    accept(&b.client(), plan(&a, &b, &[("web", "a", "b")]))
        .await
        .unwrap();
    wait_for(&b.client(), |group| {
        group.moves[0].status.phase == Phase::Bulk
    })
    .await;
    b.kill().await;
    let on_a: MoveStatus = a.client().get("/v1/moves/g/web").await.unwrap();
    assert_eq!(on_a.phase, Phase::Bulk);
    b.start_again().await.unwrap();
    wait_for(&b.client(), |group| {
        group.moves[0].status.phase == Phase::Bulk
    })
    .await;
    a.host.converge();
    assert_eq!(
        outcomes(&finished(&b.client()).await),
        [("web", Phase::Moved)]
    );
    // Ended: another restart has nothing to follow.
    b.kill().await;
    b.start_again().await.unwrap();
    assert!(
        b.client()
            .get::<Vec<GroupStatus>>("/v1/groups")
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn a_vm_that_needs_a_person_is_recovered_on_request() {
    let (a, b) = pair(&[("web", Script::NeedsPerson)], &[]).await;
    let client = a.client();
    accept(&client, plan(&a, &b, &[("web", "a", "b")]))
        .await
        .unwrap();
    let ended = finished(&client).await;
    assert_eq!(outcomes(&ended), [("web", Phase::NeedsPerson)]);
    let all = Selection::default();
    let report: ActionReport = client.post("/v1/groups/g/recover", &all).await.unwrap();
    assert_eq!(report.done, ["web"]);
    // Whoever reads the events from the start finds the newest end, and no other.
    assert_eq!(outcomes(&finished(&client).await), [("web", Phase::Moved)]);
}

#[tokio::test]
async fn a_group_id_is_used_once() {
    let (a, b) = pair(&[("web", Script::Moves)], &[]).await;
    let client = a.client();
    accept(&client, plan(&a, &b, &[("web", "a", "b")]))
        .await
        .unwrap();
    let again = refused(&client, plan(&a, &b, &[("web", "a", "b")])).await;
    assert_eq!(again.code, RefusalCode::Busy);
    finished(&client).await;
}
