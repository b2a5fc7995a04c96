//! A document that quotes the first table of a study, compared with what was found.

use std::fs;
use std::path::Path;

use super::findings::Findings;
use crate::error::{Error, Result};

/// How far at least a quoted figure may be off: other processors round in other ways.
const LEAST_LOSS: f64 = 0.01;
const LEAST_TAX: f64 = 0.03;

/// The rows of the table of a study that a document quotes, its head first, cell by cell.
fn quoted(text: &str, name: &str) -> Option<Vec<Vec<String>>> {
    let (_, rest) = text.split_once(&format!("<!-- study {name} -->"))?;
    let (table, _) = rest.split_once("<!-- end -->")?;
    let cells = |line: &str| {
        line.trim().trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
    };
    Some(table.lines().filter(|line| line.trim_start().starts_with('|')).map(cells).collect())
}

/// The cell below a head: tables of earlier versions have fewer columns.
fn cell<'a>(head: &[String], cells: &'a [String], what: &str) -> Option<&'a str> {
    let column = head.iter().position(|head| head == what)?;
    cells.get(column).map(String::as_str)
}

/// The number that a cell begins with.
fn number(cell: &str) -> Option<f64> {
    cell.trim_start_matches('~').split_whitespace().next()?.parse().ok()
}

/// The rows of the table of a study that a document quotes, cell by cell.
pub struct Quoted {
    document: String,
    rows: Vec<Vec<String>>,
}

impl Quoted {
    /// # Errors
    /// [`Error::Config`] about `quoted` if there is no such table.
    pub fn read(document: &Path, study: &str) -> Result<Quoted> {
        let wrong = |problem: String| Error::config("quoted", document.display(), problem);
        let text = fs::read_to_string(document)
            .map_err(|error| wrong(format!("cannot be read ({error})")))?;
        let rows = quoted(&text, study).ok_or_else(|| {
            wrong(format!("has no table between `<!-- study {study} -->` and `<!-- end -->`; quote {study}.md there"))
        })?;
        Ok(Quoted { document: document.display().to_string(), rows })
    }

    /// What it says of a loss or a tax that was not found again, each in words.
    pub fn missed(&self, findings: &Findings) -> Vec<String> {
        let mut missed = Vec::new();
        for row in &findings.variants {
            let Some(cells) = self.rows.iter().find(|cells| cells.first() == Some(&row.name))
            else {
                missed.push(format!("{}: {} does not quote it", row.name, self.document));
                continue;
            };

            for (what, found, least) in [
                ("loss", Some(&row.loss), LEAST_LOSS),
                ("token tax", row.tax.as_ref().map(|tax| &tax.value), LEAST_TAX),
            ] {
                let cell = self.rows.first().and_then(|head| cell(head, cells, what)).unwrap_or("");
                let agrees = match (found, number(cell)) {
                    (Some(found), Some(said)) => {
                        (said - found.mean).abs() <= found.half_interval.unwrap_or(0.0).max(least)
                    }
                    (found, said) => found.is_none() && said.is_none(),
                };

                if !agrees {
                    let found = found.map_or("none".into(), |found| found.show(4));
                    missed.push(format!("{}: a {what} of {found}, `{cell}` is quoted", row.name));
                }
            }
        }
        missed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_known_by_their_heads() {
        for (head, row) in [
            ("| variant | loss | token tax |", "| a | 2.51 ± 0.01 | ~1.20 |"),
            ("| variant | loss | bits/byte | token tax |", "| a | 2.51 ± 0.01 | 3.62 | ~1.20 |"),
        ] {
            let text = format!("<!-- study s -->\n\n{head}\n|---|\n{row}\n<!-- end -->");
            let rows = quoted(&text, "s").unwrap();
            let found = |what| cell(&rows[0], &rows[2], what).and_then(number);
            assert_eq!((found("loss"), found("token tax")), (Some(2.51), Some(1.2)), "{head}");
            assert_eq!(found("difference"), None);
        }
    }
}
