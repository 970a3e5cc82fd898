//! Drained nodes: pods are evicted as the API server does it, by the PodDisruptionBudget, while the operator looks.

use crate::world::{IN_SYNC_AFTER, World};

/// Turns in which a drain asks again and again.
const TURNS: usize = 60;

/// Two nodes are drained in a row, and the first pod comes back with an empty disk ([`World::turn`] holds that two replicas of every
/// partition are whole all the time). Says in which turns a pod went.
async fn drain_two(world: &World) -> Vec<usize> {
    let mut went = Vec::new();
    for turn in 0..TURNS {
        if went.len() < 2 && world.evict(went.len()) {
            went.push(turn);
        }
        world.turn();
        let _ = world.look(0).await;
    }
    went
}

#[tokio::test]
async fn a_second_node_is_drained_only_once_what_the_first_one_held_is_whole_again() {
    let world = World::new().await;
    world.until_settled(3, &mut |_| 0).await;
    let went = drain_two(&world).await;
    assert_eq!(went.len(), 2, "a drain ends: pods went in turns {went:?}");
    world.until_settled(3, &mut |_| 0).await;
}

#[tokio::test]
async fn an_operator_that_ends_after_any_change_leaves_no_budget_that_allows_too_much() {
    let whole = World::new().await;
    whole.until_settled(3, &mut |_| 0).await;
    let before = whole.server.changes();
    drain_two(&whole).await;
    let changes = whole.server.changes();
    assert!(changes > before + 5, "only {} changes", changes - before);
    for at in before + 1..=changes {
        let world = World::new().await;
        world.until_settled(3, &mut |_| 0).await;
        world.server.end_at(at);
        assert_eq!(drain_two(&world).await.len(), 2, "after an end at change {at}");
    }
}

/// Read by each look after everything else was decided.
const CLAIMS: &str = "/api/v1/namespaces/shop/persistentvolumeclaims";

#[tokio::test]
async fn a_pod_that_is_unready_for_a_moment_is_not_taken_as_the_second() {
    let world = World::new().await;
    world.until_settled(3, &mut |_| 0).await;
    assert!(world.evict(0));
    world.probe_fails(1, None);
    assert!(!world.evict(1), "before the operator looked");
    let _ = world.look(0).await;
    assert!(!world.evict(1), "and after");
    world.until_settled(3, &mut |_| 0).await;
}

#[tokio::test]
async fn a_budget_is_not_raised_by_a_look_that_is_out_of_date() {
    let world = World::new().await;
    world.until_settled(3, &mut |_| 0).await;
    assert!(world.evict(0));
    let mut turns = 0..TURNS;
    while turns.next().is_some() {
        world.turn();
        if world.is_whole() {
            break;
        }
        let _ = world.look(0).await;
    }
    assert_eq!(world.budget(), 0);
    world.probe_fails(2, Some(CLAIMS));
    let _ = world.look(0).await;
    assert!(!world.is_whole(), "the probe failed during the look");
    assert_eq!(world.budget(), 0);
    world.until_settled(3, &mut |_| 0).await;
    assert_eq!(world.budget(), 1);
}

/// Brokers are ready once they have everything, so that eviction itself counts rightly.
#[tokio::test]
async fn while_no_operator_runs_a_second_node_is_drained_only_once_the_first_broker_has_everything() {
    let mut world = World::new().await;
    world.ready_after = IN_SYNC_AFTER;
    world.until_settled(3, &mut |_| 0).await;
    assert!(world.evict(0));
    let mut went = None;
    for turn in 0..TURNS {
        if went.is_none() && world.evict(1) {
            went = Some(turn);
        }
        world.turn();
    }
    assert!(went.is_some_and(|turn| turn >= IN_SYNC_AFTER), "{went:?}");
}
