//! Moments as text, in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

/// A moment, taken apart (proleptic Gregorian calendar, UTC).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment {
    year: i64,
    month: u32,
    day: u32,
    weekday: usize,
    hour: u64,
    minute: u64,
    second: u64,
    nanos: u32,
}

impl From<SystemTime> for Moment {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let days = since.as_secs() / 86_400;
        let of_day = since.as_secs() % 86_400;
        // Days since 0000-03-01, so that a leap day is the last of its year; then eras of 400 years.
        let shifted = days.cast_signed() + 719_468;
        let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let of_era_year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * of_era_year + of_era_year / 4 - of_era_year / 100);
        let shifted_month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        Self {
            year: era * 400 + of_era_year + i64::from(month <= 2),
            month: month as u32,
            day: day as u32,
            weekday: ((days + 4) % 7) as usize,
            hour: of_day / 3_600,
            minute: of_day / 60 % 60,
            second: of_day % 60,
            nanos: since.subsec_nanos(),
        }
    }
}

impl Moment {
    pub(crate) fn now() -> Self {
        SystemTime::now().into()
    }

    /// As in a log line: `2026-07-20 10:00:00.123456 +00:00`.
    pub(crate) fn log(self) -> String {
        format!("{} {}.{:06} +00:00", self.date(), self.time(), self.nanos / 1_000)
    }

    /// As the API tells when something was mounted: `2026-07-20 10:00:00.5 +00:00:00`.
    pub(crate) fn api(self) -> String {
        let digits = format!("{:09}", self.nanos);
        let digits = match digits.trim_end_matches('0') {
            "" => "0".to_owned(),
            some => some.to_owned(),
        };
        format!("{} {}.{digits} +00:00:00", self.date(), self.time())
    }

    /// As in HTTP: `Mon, 20 Jul 2026 10:00:00 GMT`.
    pub(crate) fn http(self) -> String {
        const DAYS: [&str; 7] = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];
        const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
        let month = MONTHS[self.month as usize - 1];
        format!("{}, {:02} {month} {} {} GMT", DAYS[self.weekday], self.day, self.year, self.time())
    }

    /// As in the name of a file: `20260720-100000`.
    pub(crate) fn file(self) -> String {
        let Self { year, month, day, hour, minute, second, .. } = self;
        format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
    }

    fn date(self) -> String {
        format!("{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }

    fn time(self) -> String {
        format!("{:02}:{:02}:{:02}", self.hour, self.minute, self.second)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn moments_are_written_as_the_formats_want() {
        for (seconds, nanos, log, api, http) in [
            (
                0,
                0,
                "1970-01-01 00:00:00.000000 +00:00",
                "1970-01-01 00:00:00.0 +00:00:00",
                "Thu, 01 Jan 1970 00:00:00 GMT",
            ),
            (
                784_111_777,
                500_000_000,
                "1994-11-06 08:49:37.500000 +00:00",
                "1994-11-06 08:49:37.5 +00:00:00",
                "Sun, 06 Nov 1994 08:49:37 GMT",
            ),
            (
                1_709_164_800,
                1,
                "2024-02-29 00:00:00.000000 +00:00",
                "2024-02-29 00:00:00.000000001 +00:00:00",
                "Thu, 29 Feb 2024 00:00:00 GMT",
            ),
            (
                1_735_689_599,
                0,
                "2024-12-31 23:59:59.000000 +00:00",
                "2024-12-31 23:59:59.0 +00:00:00",
                "Tue, 31 Dec 2024 23:59:59 GMT",
            ),
        ] {
            let moment = Moment::from(UNIX_EPOCH + Duration::new(seconds, nanos));
            assert_eq!(moment.log().to_string(), log);
            assert_eq!(moment.api().to_string(), api);
            assert_eq!(moment.http().to_string(), http);
        }
    }
}
