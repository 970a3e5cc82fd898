//! Durations as users write them: `90s`, `1h30m`, `7d`. The same form as the resource definitions take, and no other.

const UNITS: [(&str, u64); 6] =
    [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000), ("w", 604_800_000)];

/// Reads a duration in ms. One beyond 2^64 ms is read as that number, which is outside of every bound.
pub fn millis(text: &str) -> Result<u64, String> {
    let wrong = || {
        let shown: String = text.chars().take(60).flat_map(char::escape_debug).collect();
        format!("'{shown}' is not a duration such as 30s, 1h30m or 7d: its units are ms, s, m, h, d and w")
    };
    let mut rest = text;
    let mut sum = 0u64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).filter(|at| *at > 0).ok_or_else(wrong)?;
        let (number, behind) = rest.split_at(digits);
        let end = behind.find(|c: char| c.is_ascii_digit()).unwrap_or(behind.len());
        let (unit, next) = behind.split_at(end);
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        let number: u64 = number.parse().unwrap_or(u64::MAX); // only digits: too many of them
        sum = sum.saturating_add(number.saturating_mul(*factor));
        rest = next;
    }
    if text.is_empty() { Err(wrong()) } else { Ok(sum) }
}

#[cfg(test)]
mod tests {
    use super::millis;

    #[test]
    fn durations_are_read_as_the_definitions_take_them() {
        for (text, ms) in [("90s", 90_000), ("1h30m", 5_400_000), ("7d", 604_800_000), ("2w", 1_209_600_000), ("0s", 0)]
        {
            assert_eq!(millis(text), Ok(ms), "{text}");
        }
        for bad in ["", "s", "5", "-1h", "1.5h", "1 h", "1month", "1y", "5min", "1us", "1h30", "h1", "١s", "1s\0"] {
            let refused = millis(bad).expect_err(bad);
            assert!(refused.contains("is not a duration such as 30s"), "{refused}");
        }
    }

    #[test]
    fn a_duration_beyond_all_time_does_not_wrap() {
        // of these the first was once taken for 384 ms
        for text in
            ["18446744073709552s", "9223372036854775807s", "99999999999999999999999999ms", "18446744073709551615w1s"]
        {
            assert_eq!(millis(text), Ok(u64::MAX), "{text}");
        }
    }
}
