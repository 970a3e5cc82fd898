//! A checker that finds nothing is worth nothing: hand-made bad histories, one for each verdict, and good ones beside them.

use weir_checker::{Event, History, Lease, Log, Place, Report, Verdict};

fn at(offset: u64) -> Place {
    Place { partition: 0, offset }
}

fn log(of: &str, values: &[u64]) -> Log<u64> {
    let records = values.iter().enumerate().map(|(offset, value)| (offset as u64, *value)).collect();
    Log { of: of.into(), partition: 0, start: 0, records }
}

/// Producer 1 offers 1, 2, 3, producer 2 offers 11, 12; then what is added.
fn history(more: &[Event<u64>]) -> History<u64> {
    let mut history = History::default();
    for (producer, value) in [(1, 1), (1, 2), (2, 11), (1, 3), (2, 12)] {
        history.push(Event::Offered { producer, value });
    }
    more.iter().for_each(|e| history.push(e.clone()));
    history
}

fn check(more: &[Event<u64>], logs: &[Log<u64>]) -> Report<u64> {
    history(more).check(logs)
}

fn kinds(report: &Report<u64>) -> Vec<&'static str> {
    report.0.iter().map(Verdict::kind).collect()
}

fn acked(value: u64, offset: u64) -> Event<u64> {
    Event::Acked { value, at: at(offset) }
}

#[test]
fn a_good_history_is_clean_whatever_became_of_what_has_no_answer() {
    let seen = [acked(1, 0), acked(11, 1), acked(2, 2), Event::Read { at: at(1), value: 11 }];
    check(&seen, &[log("a", &[1, 11, 2])]).assert_clean();
    check(&seen, &[log("a", &[1, 11, 2, 3, 12]), log("behind", &[1, 11])]).assert_clean();
    assert_eq!(history(&seen).acknowledged(), 3);
}

#[test]
fn what_was_acknowledged_and_is_not_there_is_lost() {
    let report = check(&[acked(1, 0), acked(2, 1)], &[log("a", &[1])]);
    assert_eq!(report.0, [Verdict::Lost { value: 2, at: at(1) }]);
    assert!(report.to_string().starts_with("1 lost\n"), "{report}");
    // at another place than was said is lost too: whoever reads from there on misses it
    let moved = check(&[acked(1, 0), acked(2, 2)], &[log("a", &[1, 2, 3])]);
    assert_eq!(kinds(&moved), ["lost"]);
    // what retention took is not
    let short = Log { start: 1, records: vec![(1, 2)], ..log("a", &[]) };
    check(&[acked(1, 0), acked(2, 1)], &[short]).assert_clean();
}

#[test]
fn what_stands_twice_is_duplicated() {
    let report = check(&[acked(1, 0)], &[log("a", &[1, 2, 1])]);
    assert_eq!(report.count("duplicated"), 1);
    assert_eq!(report.0[0], Verdict::Duplicated { value: 1, places: vec![at(0), at(2)] });
}

#[test]
fn a_producers_records_that_stand_the_wrong_way_round_are_reordered() {
    let report = check(&[], &[log("a", &[2, 11, 1, 12])]);
    assert_eq!(report.0, [Verdict::Reordered { producer: 1, earlier: 1, later: 2 }]);
    // of two producers any order will do, and a gap is none
    check(&[], &[log("a", &[11, 12, 1, 3])]).assert_clean();
}

#[test]
fn two_values_at_one_offset_diverge() {
    let replicas = check(&[], &[log("a", &[1, 2]), log("b", &[1, 11])]);
    assert_eq!(replicas.0, [Verdict::Diverging { at: at(1), one: 2, other: 11 }]);
    let told = check(&[acked(1, 0), Event::Read { at: at(0), value: 11 }], &[log("a", &[1])]);
    assert_eq!(kinds(&told), ["diverging", "vanished"]);
}

#[test]
fn what_was_read_and_is_gone_has_vanished() {
    let report = check(&[Event::Read { at: at(1), value: 2 }], &[log("a", &[1])]);
    assert_eq!(report.0, [Verdict::Vanished { value: 2, at: at(1) }]);
}

#[test]
fn what_was_refused_and_is_there_is_undead_and_what_nobody_offered_invented() {
    let report = check(&[Event::Refused { value: 2 }], &[log("a", &[1, 2])]);
    assert_eq!(report.0, [Verdict::Undead { value: 2, at: at(1) }]);
    let report = check(&[], &[log("a", &[1, 99])]);
    assert_eq!(report.0, [Verdict::Invented { value: 99, at: at(1) }]);
}

#[test]
fn a_position_that_goes_back_by_itself_is_found() {
    let seen = |offset| Event::Position { subscription: 5, partition: 0, offset };
    let report = check(&[seen(3), seen(7), seen(4)], &[log("a", &[])]);
    assert_eq!(report.0, [Verdict::WentBack { subscription: 5, partition: 0, from: 7, to: 4 }]);
    let sought = Event::Sought { subscription: 5, partition: 0, offset: 2 };
    check(&[seen(7), sought, seen(4), seen(4)], &[log("a", &[])]).assert_clean();
}

#[test]
fn a_message_held_by_two_members_at_one_time_is_found() {
    let lease = Lease { subscription: 5, at: at(0) };
    let taken = |member, now_ms| Event::Leased { lease, member, now_ms, until_ms: now_ms + 10 };
    let report = check(&[taken(1, 0), taken(2, 9)], &[log("a", &[1])]);
    assert_eq!(report.0, [Verdict::HeldTwice { lease, members: (1, 2) }]);
    // one that was given back, ran out, or is another message's, is nobody's
    let back = Event::Released { lease, member: 1 };
    check(&[taken(1, 0), back, taken(2, 9)], &[log("a", &[1])]).assert_clean();
    check(&[taken(1, 0), taken(2, 10)], &[log("a", &[1])]).assert_clean();
    let foreign = Event::Released { lease, member: 3 };
    assert_eq!(kinds(&check(&[taken(1, 0), foreign, taken(2, 9)], &[log("a", &[1])])), ["held-twice"]);
}
