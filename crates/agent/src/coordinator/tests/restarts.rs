//! Moves whose source agent, or whose coordinator, was started again.

use super::*;
use crate::types::MoveSpec;

/// A move of the group as its source's journal has it.
fn interrupted(a: &TestAgent, b: &TestAgent, vm: &str) -> MoveSpec {
    let keys = [("default".to_owned(), "00".repeat(32))].into();
    plan(a, b, &[(vm, "a", "b")]).specs("g", &keys).remove(0)
}

/// Waits for the phase of a move at its source.
async fn wait_at_source(a: &TestAgent, vm: &str, phase: Phase) {
    let (client, path) = (a.client(), format!("/v1/moves/g/{vm}"));
    let wait = async {
        while client.get::<MoveStatus>(&path).await.unwrap().phase != phase {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, wait).await.unwrap();
}

async fn recover(client: &Client) -> ActionReport {
    let all = Selection::default();
    client.post("/v1/groups/g/recover", &all).await.unwrap()
}

#[tokio::test]
async fn an_older_end_in_the_log_of_a_restarted_agent_does_not_end_a_recovery() {
    let (mut a, b) = pair(&[("web", Script::NeedsPerson)], &[]).await;
    let client = b.client();
    accept(&client, plan(&a, &b, &[("web", "a", "b")]))
        .await
        .unwrap();
    assert_eq!(
        outcomes(&finished(&client).await),
        [("web", Phase::NeedsPerson)]
    );
    let spec = interrupted(&a, &b, "web");
    let host = FakeHost::new([], MEMORY).with_slow_recovery();
    a.replace_host(host.with_interrupted(vec![spec])).await;
    a.start_again().await.unwrap();
    a.host.end_recovery(Phase::NeedsPerson);
    wait_at_source(&a, "web", Phase::NeedsPerson).await;

    assert_eq!(recover(&client).await.done, ["web"]);
    wait_at_source(&a, "web", Phase::Recovering).await;
    // Time to read what was before.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let status: GroupStatus = client.get("/v1/groups/g").await.unwrap();
    assert!(!status.finished, "{status:?}");
    a.host.end_recovery(Phase::Moved);
    // The first end that is read, from the start: the one before is forgotten.
    assert_eq!(outcomes(&finished(&client).await), [("web", Phase::Moved)]);
}

#[tokio::test]
async fn a_vm_that_needs_a_person_is_known_after_the_coordinators_restart_until_it_is_recovered() {
    let on_a = [("web", Script::Moves), ("lost", Script::NeedsPerson)];
    let (mut a, mut b) = pair(&on_a, &[]).await;
    let moves = [("web", "a", "b"), ("lost", "a", "b")];
    accept(&b.client(), plan(&a, &b, &moves)).await.unwrap();
    let before = finished(&b.client()).await;
    let expected = [("web", Phase::Moved), ("lost", Phase::NeedsPerson)];
    assert_eq!(outcomes(&before), expected);
    b.kill().await;
    // The source has forgotten the VM that has moved, and looks for the other.
    let spec = interrupted(&a, &b, "lost");
    let host = FakeHost::new([], MEMORY).with_slow_recovery();
    a.replace_host(host.with_interrupted(vec![spec])).await;
    a.start_again().await.unwrap();
    a.host.end_recovery(Phase::NeedsPerson);
    wait_at_source(&a, "lost", Phase::NeedsPerson).await;

    b.start_again().await.unwrap();
    let after = finished(&b.client()).await;
    assert_eq!(outcomes(&after), expected);
    let messages = |finished: &GroupFinished| finished.outcomes[0].status.message.clone();
    assert_eq!(messages(&after), messages(&before));

    assert_eq!(recover(&b.client()).await.done, ["lost"]);
    a.host.end_recovery(Phase::Moved);
    let moved = [("web", Phase::Moved), ("lost", Phase::Moved)];
    assert_eq!(outcomes(&finished(&b.client()).await), moved);
    b.kill().await;
    b.start_again().await.unwrap();
    let groups: Vec<GroupStatus> = b.client().get("/v1/groups").await.unwrap();
    assert!(groups.is_empty(), "nothing is left to be followed");
}

#[tokio::test]
async fn an_agent_that_answers_again_gets_the_share_that_it_could_not_be_told() {
    let vm = |name| [(name, Script::NeverConverges)];
    let (mut a, b) = pair(&vm("web"), &vm("quick")).await;
    let budget = 4 << 20;
    let plan = Plan {
        max_bandwidth_bytes_per_s: Some(budget),
        ..plan(&a, &b, &[("web", "a", "b"), ("quick", "b", "a")])
    };
    let client = b.client();
    accept(&client, plan).await.unwrap();
    let copies = |one: &crate::types::GroupMove| one.status.phase == Phase::Bulk;
    wait_for(&client, |group| group.moves.iter().all(copies)).await;
    a.kill().await;
    wait_for(&client, |group| !group.moves[0].reachable).await;
    let quick = Selection {
        vm: Some("quick".to_owned()),
    };
    let report: ActionReport = client.post("/v1/groups/g/cancel", &quick).await.unwrap();
    assert_eq!(report.done, ["quick"]);
    wait_for(&client, |group| {
        group.moves[1].status.phase == Phase::Stayed
    })
    .await;

    let spec = interrupted(&a, &b, "web");
    let host = FakeHost::new([], MEMORY).with_slow_recovery();
    a.replace_host(host.with_interrupted(vec![spec])).await;
    a.start_again().await.unwrap();
    let share = || a.host.limits().last()?.1.group_bytes_per_s;
    let wait = async {
        while share() != Some(budget) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(TIMEOUT * 2, wait).await.unwrap();
    a.host.end_recovery(Phase::Moved);
    let expected = [("web", Phase::Moved), ("quick", Phase::Stayed)];
    assert_eq!(outcomes(&finished(&client).await), expected);
}
