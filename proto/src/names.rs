//! Names of topics, subscriptions, snapshots and brokers: one rule for manifests, the command line and brokers.

/// Characters of each part of a name, as of a resource's.
pub const CHARS_MAX: usize = 253;
/// The namespace of a name that has none.
pub const NAMESPACE_DEFAULT: &str = "default";
/// What a name is, for a user.
const RULE: &str = "names are a-z, 0-9, '-' and '.', begin and end with a letter or digit, at most 253 characters";

/// Whether this is one part of a name: 1 to 253 characters of `a-z`, `0-9`, `-` and `.`.
pub fn is_part(part: &str) -> bool {
    let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    (1..=CHARS_MAX).contains(&part.len())
        && part.chars().all(|c| letter(c) || c == '-' || c == '.')
        && part.starts_with(letter)
        && part.ends_with(letter)
        && !part.contains("..")
}

/// `name` with its namespace, checked; the error says what a name is.
pub fn full_name(name: &str) -> Result<String, String> {
    let (namespace, short) = name.split_once('/').unwrap_or((NAMESPACE_DEFAULT, name));
    if is_part(namespace) && is_part(short) { Ok(format!("{namespace}/{short}")) } else { Err(refusal(name)) }
}

/// Why this is not a name.
pub fn refusal(name: &str) -> String {
    let shown: String = name.chars().take(60).flat_map(char::escape_default).collect();
    format!("'{shown}' is not a name: {RULE}")
}

#[cfg(test)]
mod tests {
    use super::full_name;

    #[test]
    fn names_get_their_namespace_and_bad_ones_are_refused() {
        assert_eq!(full_name("orders").unwrap(), "default/orders");
        assert_eq!(full_name("shop/orders.v1").unwrap(), "shop/orders.v1");
        let long = "x".repeat(300);
        for bad in ["", "../x", "a/../b", "a\0b", "A", "a/b/c", "-a", "a-", "a..b", &long, "/", "a/"] {
            assert!(full_name(bad).is_err(), "{bad:?}");
        }
    }
}
