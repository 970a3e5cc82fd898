//! Errors as clients see them: the one place where a failure becomes a google.rpc code.

use crate::formation::PlanError;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use weir_core::batch::BatchError;
use weir_core::meta::command::MetaError;
use weir_core::meta::placement::PlacementError;
use weir_core::node::Refusal;
use weir_core::storage::StoreError;
use weir_proto::v1;

/// Bytes of a message that repeats what a client sent: it stands twice in an answer's headers, encoded, of which clients take 8 to 16 KiB.
/// The same for an error on a stream.
const MESSAGE_BYTES_MAX: usize = 1_024;

/// A failure of a client's request.
#[derive(Debug, Clone)]
pub struct Failure {
    /// google.rpc code.
    pub code: Code,
    /// Stable, for programs.
    pub reason: &'static str,
    /// For people: what and what to do.
    pub message: String,
    /// With NOT_LEADER: the leader's address.
    pub leader: String,
}

impl Failure {
    /// With a code, a reason and a message.
    pub fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), leader: String::new() }
    }

    /// Another broker leads; its address where known.
    pub fn not_leader(leader: String) -> Self {
        let message = match leader.as_str() {
            "" => "the partition has no leader now; try again".to_owned(),
            address => format!("the partition's leader is at {address}"),
        };
        Self { code: Code::FailedPrecondition, reason: "NOT_LEADER", message, leader }
    }

    /// A name, a number or bytes that cannot be right.
    pub fn invalid(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, reason, message)
    }

    /// The broker is stopping.
    pub fn stopping() -> Self {
        Self::new(Code::Unavailable, "STOPPING", "the broker is stopping; try another")
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::NotLeader | Refusal::UnknownGroup => Self::not_leader(String::new()),
            Refusal::LeadershipLost => Self::new(Code::Unavailable, "LEADERSHIP_LOST", message),
            Refusal::Overloaded => Self::new(Code::ResourceExhausted, "OVERLOADED", message),
            Refusal::DiskFull => Self::new(Code::ResourceExhausted, "DISK_FULL", message),
            Refusal::Sequence(_) => Self::new(Code::FailedPrecondition, "SEQUENCE", message),
        }
    }
}

impl From<BatchError> for Failure {
    fn from(error: BatchError) -> Self {
        Self::invalid("BATCH", error.to_string())
    }
}

impl From<PlacementError> for Failure {
    fn from(error: PlacementError) -> Self {
        Self::new(Code::FailedPrecondition, "TOO_FEW_BROKERS", error.to_string())
    }
}

impl From<MetaError> for Failure {
    fn from(error: MetaError) -> Self {
        let message = error.to_string();
        match error {
            MetaError::NotFound { .. } => Self::new(Code::NotFound, "NOT_FOUND", message),
            MetaError::Conflict { .. } => Self::new(Code::AlreadyExists, "CONFLICT", message),
            MetaError::Invalid(_) => Self::invalid("INVALID", message),
            MetaError::Placement(error) => error.into(),
            MetaError::Stale => Self::new(Code::Aborted, "STALE", message),
        }
    }
}

impl From<PlanError> for Failure {
    fn from(error: PlanError) -> Self {
        let message = error.to_string();
        match error {
            PlanError::OtherCluster { .. } => Self::new(Code::PermissionDenied, "NOT_A_PEER", message),
            PlanError::Formed { .. } => Self::new(Code::FailedPrecondition, "FORMED", message),
            PlanError::NotPrepared(_) => Self::new(Code::FailedPrecondition, "NOT_PREPARED", message),
            PlanError::Invalid(_) => Self::invalid("PLAN", message),
            PlanError::Store(error) => error.into(),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let code = match error {
            StoreError::Damaged { .. } | StoreError::Corrupt(_) | StoreError::Lost { .. } => Code::DataLoss,
            StoreError::Compacted { .. } => Code::OutOfRange,
            StoreError::Io(_) => Code::Internal,
        };
        Self::new(code, "STORE", error.to_string())
    }
}

/// As much of a message as an answer repeats.
fn shown(mut message: String) -> String {
    if message.len() > MESSAGE_BYTES_MAX {
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        message.push('…');
    }
    message
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let mut metadata = std::collections::HashMap::new();
        if !failure.leader.is_empty() {
            metadata.insert("leader".to_owned(), failure.leader);
        }
        let details = ErrorDetails::with_error_info(failure.reason, "weir.dev", metadata);
        Status::with_error_details(failure.code, shown(failure.message), details)
    }
}

impl From<Failure> for v1::Error {
    fn from(failure: Failure) -> Self {
        Self {
            code: failure.code as i32,
            message: shown(failure.message),
            reason: failure.reason.to_owned(),
            leader: failure.leader,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_repeats_no_more_of_a_request_than_clients_take() {
        for text in ["x".repeat(100_000), "ü".repeat(100_000), "\u{1}".repeat(100_000)] {
            let status = Status::from(Failure::invalid("INVALID", text.clone()));
            assert!(text.starts_with(status.message().trim_end_matches('…')) && status.message().ends_with('…'));
            let headers: http::HeaderMap = status.clone().into_http::<()>().headers().clone();
            let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
            assert!(bytes < 8 << 10, "{bytes} bytes of headers");
            let on_a_stream = v1::Error::from(Failure::invalid("INVALID", text));
            assert_eq!(on_a_stream.message, status.message());
        }
        assert_eq!(v1::Error::from(Failure::invalid("INVALID", "short")).message, "short");
        assert_eq!(Status::from(Failure::invalid("INVALID", "short")).message(), "short");
    }

    #[test]
    fn plans_of_other_clusters_are_refused_as_their_senders_are() {
        let (name, own, asked) = ("b".to_owned(), "c".to_owned(), "d".to_owned());
        let io = PlanError::Store(StoreError::Io("no disk".into()));
        for (error, code, reason) in [
            (
                PlanError::OtherCluster { name: name.clone(), relation: "belongs to", own: own.clone(), asked },
                Code::PermissionDenied,
                "NOT_A_PEER",
            ),
            (PlanError::Formed { name, own: own.clone() }, Code::FailedPrecondition, "FORMED"),
            (PlanError::NotPrepared(own), Code::FailedPrecondition, "NOT_PREPARED"),
            (PlanError::Invalid("no plan".into()), Code::InvalidArgument, "PLAN"),
            (io, Code::Internal, "STORE"),
        ] {
            let failure = Failure::from(error);
            assert_eq!((failure.code, failure.reason), (code, reason));
        }
    }
}
