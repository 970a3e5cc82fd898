/* Preloaded into brokers under test: a disk that can lose power, fail and jump in time.
 *
 * WEIR_POWER_DIR      files below this folder are watched
 * WEIR_POWER_JOURNAL  "S <size> <path>" after each sync that succeeded, with the file's size when it began;
 *                     "R <from> <to>" after each rename
 * WEIR_POWER_FAIL     while this file exists, syncs below the folder whose path it holds fail with EIO
 * WEIR_POWER_CLOCK    if this file exists, it holds the seconds by which the wall clock is off
 *
 * What lies beyond a file's last synced size is what a power cut may take. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int journal(const char *line, int length) {
    const char *path = getenv("WEIR_POWER_JOURNAL");
    if (!path) return 0;
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) return -1;
    int written = write(fd, line, length) == length;
    close(fd);
    return written ? 0 : -1;
}

static int watched(const char *path) {
    const char *folder = getenv("WEIR_POWER_DIR");
    return folder && strncmp(path, folder, strlen(folder)) == 0;
}

static int fails(const char *path) {
    const char *file = getenv("WEIR_POWER_FAIL");
    char folder[PATH_MAX] = {0};
    int fd = file ? open(file, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return 0;
    ssize_t length = read(fd, folder, sizeof folder - 1);
    close(fd);
    return length > 0 && strncmp(path, folder, length) == 0;
}

static int synced(int fd, int (*real)(int)) {
    char link[64], path[PATH_MAX], line[PATH_MAX + 32];
    struct stat at_begin;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return real(fd);
    path[length] = 0;
    if (!watched(path)) return real(fd);
    if (fails(path)) {
        errno = EIO;
        return -1;
    }
    if (fstat(fd, &at_begin) != 0) return -1;
    /* no real sync: power is cut by this program, which the page cache outlives */
    int n = snprintf(line, sizeof line, "S %lld %s\n", (long long)at_begin.st_size, path);
    return S_ISREG(at_begin.st_mode) ? journal(line, n) : 0;
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return synced(fd, real);
}

int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return synced(fd, real);
}

int rename(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    if (!real) real = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename");
    int result = real(from, to);
    if (result == 0 && watched(to)) {
        char line[2 * PATH_MAX + 8];
        journal(line, snprintf(line, sizeof line, "R %s %s\n", from, to));
    }
    return result;
}

int clock_gettime(clockid_t clock, struct timespec *out) {
    static int (*real)(clockid_t, struct timespec *);
    static time_t looked, off;
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, out);
    if (result != 0 || clock != CLOCK_REALTIME) return result;
    if (out->tv_sec != looked) {
        const char *path = getenv("WEIR_POWER_CLOCK");
        int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        char text[32] = {0};
        looked = out->tv_sec;
        off = fd >= 0 && read(fd, text, sizeof text - 1) > 0 ? atoll(text) : 0;
        if (fd >= 0) close(fd);
    }
    out->tv_sec += off;
    return 0;
}
