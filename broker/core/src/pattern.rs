//! Patterns of dotted names, as topic exchanges of AMQP 0-9-1 have them: `*` stands for one word, `#` for any number of words.

/// Whether a name is a pattern.
pub fn is_pattern(name: &str) -> bool {
    name.contains(['*', '#'])
}

/// Whether a pattern is one: `*` and `#` are words of their own, and it has at most 255 bytes.
pub fn is_well_formed(pattern: &str) -> bool {
    pattern.len() <= BYTES_MAX
        && pattern.split('.').all(|word| !word.is_empty() && (word == "*" || word == "#" || !is_pattern(word)))
}

/// Bytes of a pattern, and of a name: longer ones match nothing, as in AMQP.
const BYTES_MAX: usize = 255;

/// Whether a dotted name, of at most 255 bytes, matches. Takes time by the sum of both lengths in words; by their product at most, where
/// the words repeat themselves.
pub fn matches(pattern: &str, name: &str) -> bool {
    if name.len() > BYTES_MAX {
        return false;
    }
    let words: Vec<&str> = if name.is_empty() { Vec::new() } else { name.split('.').collect() };
    let parts: Vec<&str> = pattern.split('.').collect();
    let (mut part, mut word) = (0, 0);
    // behind the last `#`, and the first word that it does not stand for: what came before it need not be changed any more
    let mut last = None;
    loop {
        match (parts.get(part), words.get(word)) {
            (Some(&"#"), _) => {
                part += 1;
                last = Some((part, word));
            }
            // no word is left for this part, and fewer would be where the last `#` stood for more
            (Some(_), None) => return false,
            (Some(wanted), Some(given)) if *wanted == "*" || wanted == given => {
                part += 1;
                word += 1;
            }
            (None, None) => return true,
            _ => {
                let Some((behind, first)) = last.as_mut() else { return false };
                *first += 1;
                (part, word) = (*behind, *first);
            }
        }
    }
}

/// Whether a topic's full name, `namespace/name`, matches a pattern of one namespace's topics.
pub fn matches_topic(pattern: &str, topic: &str) -> bool {
    match (pattern.split_once('/'), topic.split_once('/')) {
        (Some((wanted, pattern)), Some((namespace, name))) => wanted == namespace && matches(pattern, name),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words_match_as_topic_exchanges_match_them() {
        for (pattern, name, wanted) in [
            ("orders.*", "orders.eu", true),
            ("orders.*", "orders", false),
            ("orders.*", "orders.eu.paid", false),
            ("orders.#", "orders", true),
            ("orders.#", "orders.eu.paid", true),
            ("#", "anything.at.all", true),
            ("#", "", true),
            ("*", "", false),
            ("*.paid", "eu.paid", true),
            ("#.paid", "orders.eu.paid", true),
            ("#.paid", "paid", true),
            ("a.#.b.#.c", "a.x.b.c", true),
            ("a.#.b.#.c", "a.x.c.b", false),
            ("a.*.#", "a", false),
            ("orders", "orders", true),
        ] {
            assert_eq!(matches(pattern, name), wanted, "{pattern} {name}");
        }
        assert!(matches_topic("shop/orders.*", "shop/orders.eu") && !matches_topic("shop/orders.*", "bank/orders.eu"));
        assert!(is_well_formed("a.*.#") && !is_well_formed("a.b*") && !is_well_formed("a..b") && !is_well_formed(""));
    }

    fn plainly(pattern: &[&str], words: &[&str]) -> bool {
        match (pattern.first(), words.first()) {
            (None, None) => true,
            (Some(&"#"), _) => plainly(&pattern[1..], words) || (!words.is_empty() && plainly(pattern, &words[1..])),
            (Some(part), Some(word)) if *part == "*" || part == word => plainly(&pattern[1..], &words[1..]),
            _ => false,
        }
    }

    /// All lists of at most `words_max` of these words.
    fn lists<'a>(words: &[&'a str], words_max: usize) -> Vec<Vec<&'a str>> {
        let mut all = vec![Vec::new()];
        let mut from = 0;
        for _ in 0..words_max {
            let longest = all[from..].to_vec();
            from = all.len();
            all.extend(longest.iter().flat_map(|list| words.iter().map(|word| [&list[..], &[*word]].concat())));
        }
        all
    }

    #[test]
    fn matching_agrees_with_the_definition_for_all_short_patterns_and_names() {
        let names = lists(&["a", "b"], 6);
        for pattern in lists(&["a", "b", "*", "#"], 5).iter().filter(|pattern| !pattern.is_empty()) {
            for words in &names {
                let (text, name) = (pattern.join("."), words.join("."));
                assert_eq!(matches(&text, &name), plainly(pattern, words), "{text} {name}");
            }
        }
    }

    proptest! {
        #[test]
        fn matching_agrees_with_the_definition(
            pattern in proptest::collection::vec(prop_oneof!["a", "b", Just("*".to_owned()), Just("#".to_owned())], 1..9),
            words in proptest::collection::vec("[ab]", 0..9),
        ) {
            let (p, w): (Vec<&str>, Vec<&str>) =
                (pattern.iter().map(String::as_str).collect(), words.iter().map(String::as_str).collect());
            prop_assert_eq!(matches(&pattern.join("."), &words.join(".")), plainly(&p, &w));
        }
    }
}
