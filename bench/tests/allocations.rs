//! A broker's path asks for memory by the batch, never by the record.

use weir_bench::publish;

/// Allocations of one step, once all has the size it keeps.
fn of(step: &mut dyn FnMut()) -> u64 {
    (0..50).for_each(|_| step());
    allocation_counter::measure(|| (0..100).for_each(|_| step())).count_total
}

#[test]
fn a_thousand_records_cost_a_broker_no_more_allocations_than_ten() {
    for brokers in [1, 3] {
        let (few, many) = (of(&mut publish(brokers, 10)), of(&mut publish(brokers, 1_000)));
        println!("{brokers} brokers: {few} allocations for a hundred batches of ten records, {many} of a thousand");
        // checkpoints come by bytes, so larger batches bring more of them
        assert!(many <= few + few / 20, "{many} instead of {few}");
    }
}
