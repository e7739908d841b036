//! Tests of errors: the table of statuses, and what each says about what happened.

use super::*;

const LOOK: Call = Call::reads("Look");
const MAKE: Call = Call::changes("Make");

#[test]
fn failed_sorts_every_code_by_what_the_caller_can_do() {
    for code in (0..17).map(Code::from_i32).filter(|code| *code != Code::Ok) {
        let error = MAKE.failed(&Status::new(code, "because"));
        let fits = match code {
            Code::InvalidArgument => matches!(error, Error::Invalid { .. }),
            Code::PermissionDenied | Code::FailedPrecondition | Code::AlreadyExists => {
                matches!(error, Error::Refused { .. })
            }
            Code::ResourceExhausted => matches!(error, Error::Busy { .. }),
            Code::Unimplemented => matches!(error, Error::Unimplemented { .. }),
            Code::Unavailable => matches!(error, Error::Unavailable { .. }),
            Code::Unauthenticated | Code::NotFound | Code::Aborted => {
                matches!(error, Error::SessionLost { .. })
            }
            Code::OutOfRange => matches!(error, Error::BadReply { .. }),
            _ => matches!(error, Error::Daemon { .. }),
        };
        assert!(fits, "{code:?}: {error}");
        assert!(error.to_string().contains("because"), "{code:?}: {error}");
    }
}

// E1: whatever failed, a call that changes something and was not refused may have happened.
#[test]
fn happened_is_unknown_only_for_calls_that_change_something() {
    let internal = Status::internal("broke");
    assert_eq!(MAKE.failed(&internal).happened(), Happened::Unknown);
    assert_eq!(LOOK.failed(&internal).happened(), Happened::No);
    let late = Duration::from_secs(1);
    assert_eq!(MAKE.timeout(late).happened(), Happened::Unknown);
    assert_eq!(LOOK.timeout(late).happened(), Happened::No);
    assert_eq!(MAKE.lost("gone").happened(), Happened::Unknown);
    assert_eq!(MAKE.bad_reply("odd").happened(), Happened::Unknown);
    assert_eq!(Error::invalid("no").happened(), Happened::No);
}

#[test]
fn failed_takes_a_broken_connection_for_a_lost_session() {
    let broken = std::io::Error::new(std::io::ErrorKind::BrokenPipe, "pipe broke");
    let error = MAKE.failed(&Status::from_error(Box::new(broken)));
    assert!(matches!(error, Error::SessionLost { .. }), "{error}");
    assert!(error.to_string().contains("pipe broke"), "{error}");
}

// E1: a stream that is refused at its hundredth block has saved ninety-nine.
#[test]
fn happened_is_unknown_for_a_refusal_in_the_middle_of_a_call() {
    let call = Call::changes_by_parts("Put");
    for code in [
        Code::InvalidArgument,
        Code::ResourceExhausted,
        Code::Unavailable,
        Code::DeadlineExceeded,
    ] {
        let error = call.failed(&Status::new(code, "because"));
        assert_eq!(error.happened(), Happened::Unknown, "{code:?}");
        let transient = code != Code::InvalidArgument;
        assert_eq!(error.is_transient(), transient, "{code:?}");
        assert_eq!(
            MAKE.failed(&Status::new(Code::Unavailable, "no"))
                .happened(),
            Happened::No
        );
    }
    let gone = call.failed(&Status::unauthenticated("gone"));
    assert!(
        matches!(
            gone,
            Error::SessionLost {
                happened: Happened::Unknown,
                ..
            }
        ),
        "{gone}"
    );
}
