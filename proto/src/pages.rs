//! The answers of the Metadata service are pages. A caller follows them to the last one here, and what was divided is joined again.

use crate::{limits::PAGE_TOKEN_BYTES_MAX, v1};
use tonic::Status;

/// Pages of one answer, beyond which something is wrong at the broker: 3 GiB.
const PAGES_MAX: usize = 1_024;

/// Says which page is next, if there is one.
fn next(asked_for: &str, next: String, pages: usize) -> Result<Option<String>, Status> {
    match next {
        next if next.is_empty() => Ok(None),
        next if next.len() > PAGE_TOKEN_BYTES_MAX => {
            let bytes = next.len();
            Err(Status::internal(format!("a page's token has {PAGE_TOKEN_BYTES_MAX} bytes at most, not {bytes}")))
        }
        next if next == asked_for || pages >= PAGES_MAX => {
            Err(Status::internal(format!("the answer has no end: page {pages} continues with '{next}'")))
        }
        next => Ok(Some(next)),
    }
}

/// Asks for all pages of `request` by `call`, and joins them. The version is that of the first page; a later page that is older is refused
/// with `ABORTED`: the request may be repeated.
pub async fn metadata<F, R>(request: v1::GetMetadataRequest, call: F) -> Result<v1::GetMetadataResponse, Status>
where
    F: Fn(v1::GetMetadataRequest) -> R,
    R: Future<Output = Result<v1::GetMetadataResponse, Status>>,
{
    let mut whole = call(request.clone()).await?;
    let (mut token, mut pages) = (request.page_token.clone(), 1);
    while let Some(page_token) = next(&token, std::mem::take(&mut whole.next_page_token), pages)? {
        let page = call(v1::GetMetadataRequest { page_token: page_token.clone(), ..request.clone() }).await?;
        if page.version < whole.version || page.cluster_id != whole.cluster_id {
            return Err(Status::aborted("the broker of the next page is behind the one of the first page; ask again"));
        }
        (token, pages) = (page_token, pages + 1);
        whole.next_page_token = page.next_page_token;
        whole.topics.extend(page.topics);
        let mut subscriptions = page.subscriptions.into_iter().peekable();
        if let Some(last) = whole.subscriptions.last_mut()
            && let Some(more) = subscriptions.next_if(|s| s.id == last.id && s.name == last.name)
        {
            last.topics.extend(more.topics);
        }
        whole.subscriptions.extend(subscriptions);
    }
    Ok(whole)
}

/// Asks for all pages of `request` by `call`, and joins them. A page of another broker is refused with `ABORTED`.
pub async fn describe<F, R>(request: v1::DescribeRequest, call: F) -> Result<v1::DescribeResponse, Status>
where
    F: Fn(v1::DescribeRequest) -> R,
    R: Future<Output = Result<v1::DescribeResponse, Status>>,
{
    let mut whole = call(request.clone()).await?;
    let (mut token, mut pages) = (request.page_token.clone(), 1);
    while let Some(page_token) = next(&token, std::mem::take(&mut whole.next_page_token), pages)? {
        let page = call(v1::DescribeRequest { page_token: page_token.clone(), ..request.clone() }).await?;
        if page.broker != whole.broker {
            return Err(Status::aborted("another broker answered for the next page; ask again"));
        }
        (token, pages) = (page_token, pages + 1);
        whole.next_page_token = page.next_page_token;
        let mut partitions = page.partitions.into_iter().peekable();
        if let Some(last) = whole.partitions.last_mut()
            && let Some(more) = partitions.next_if(|p| p.group == last.group)
        {
            last.subscriptions.extend(more.subscriptions);
        }
        whole.partitions.extend(partitions);
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_that_is_too_long_is_not_sent_back() {
        let token = |bytes: usize| next("", "x".repeat(bytes), 1);
        assert!(token(PAGE_TOKEN_BYTES_MAX).is_ok());
        let refused = token(3 << 20).unwrap_err();
        assert!(refused.message().contains("1200 bytes at most, not 3145728"), "{}", refused.message());
    }
}
