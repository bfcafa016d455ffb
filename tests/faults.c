/* Makes the n-th counted system call of a process fail; preloaded by test_faults.py.

   Calls that read, write, sync, create, rename or remove are counted, in all threads together. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/uio.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SHORT = -1, DIE = -2 };

static atomic_int armed, counted, kind, target, lasts, hit;
static char point[64];

/* Count from now on and let call number `nth` (from 1) fail with the error number `what`, return short, or kill
   the process; with `all`, every later call of the same name too, as when a disk stays full. */
void fault_arm(int what, int nth, int all) { kind = what; target = nth; lasts = all; counted = hit = 0; point[0] = 0; armed = 1; }
void fault_disarm(void) { armed = 0; }
/* The name of the call that failed, empty if none did; the number of counted calls. */
const char *fault_point(void) { return point; }
int fault_count(void) { return counted; }

/* The fault of this call: 0 for none, SHORT, or an error number. */
static int strike(const char *name) {
    if (!armed) return 0;
    int number = atomic_fetch_add(&counted, 1) + 1;
    if (number != target && !(lasts && hit && !strcmp(name, point))) return 0;
    if (kind == DIE) kill(getpid(), SIGKILL), pause();
    if (!hit) strncpy(point, name, sizeof point - 1);
    hit = 1;
    return kind;
}

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); real; })
#define FAIL(name) do { int error = strike(#name); if (error > 0) { errno = error; return -1; } } while (0)
/* Short reads and writes transfer half of the bytes, at least one. */
#define SHORTEN(name, count) do { int error = strike(#name); if (error > 0) { errno = error; return -1; } \
    if (error == SHORT && count > 1) count = count / 2; } while (0)

ssize_t read(int fd, void *data, size_t count) { SHORTEN(read, count); return REAL(read)(fd, data, count); }
ssize_t write(int fd, const void *data, size_t count) {
    if (fd == 1 || fd == 2) return REAL(write)(fd, data, count);  /* The output that the test reads. */
    SHORTEN(write, count);
    return REAL(write)(fd, data, count);
}
ssize_t pread64(int fd, void *data, size_t count, off64_t at) { SHORTEN(pread64, count); return REAL(pread64)(fd, data, count, at); }
ssize_t pread(int fd, void *data, size_t count, off_t at) { SHORTEN(pread, count); return REAL(pread)(fd, data, count, at); }
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) { SHORTEN(pwrite64, count); return REAL(pwrite64)(fd, data, count, at); }
ssize_t pwrite(int fd, const void *data, size_t count, off_t at) { SHORTEN(pwrite, count); return REAL(pwrite)(fd, data, count, at); }

static ssize_t some(ssize_t (*real)(int, const struct iovec *, int, off64_t), int error, int fd, const struct iovec *parts, int count, off64_t at) {
    struct iovec half = parts[0];
    if (error != SHORT || half.iov_len < 2) return real(fd, parts, count, at);
    half.iov_len /= 2;
    return real(fd, &half, 1, at);
}
#define PREADV(name, offset) ssize_t name(int fd, const struct iovec *parts, int count, offset at) { \
    int error = strike(#name); if (error > 0) { errno = error; return -1; } \
    return some((ssize_t (*)(int, const struct iovec *, int, off64_t))REAL(name), error, fd, parts, count, at); }
PREADV(preadv64, off64_t)
PREADV(preadv, off_t)
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags) {
    int error = strike("preadv64v2");
    struct iovec half = parts[0];
    if (error > 0) { errno = error; return -1; }
    if (error != SHORT || half.iov_len < 2) return REAL(preadv64v2)(fd, parts, count, at, flags);
    half.iov_len /= 2;
    return REAL(preadv64v2)(fd, &half, 1, at, flags);
}

int fsync(int fd) { FAIL(fsync); return REAL(fsync)(fd); }
int fdatasync(int fd) { FAIL(fdatasync); return REAL(fdatasync)(fd); }
int ftruncate64(int fd, off64_t size) { FAIL(ftruncate64); return REAL(ftruncate64)(fd, size); }
int ftruncate(int fd, off_t size) { FAIL(ftruncate); return REAL(ftruncate)(fd, size); }
int fallocate64(int fd, int mode, off64_t at, off64_t size) { FAIL(fallocate64); return REAL(fallocate64)(fd, mode, at, size); }
int rename(const char *from, const char *to) { FAIL(rename); return REAL(rename)(from, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { FAIL(renameat2); return REAL(renameat2)(a, from, b, to, flags); }
int mkdir(const char *path, mode_t mode) { FAIL(mkdir); return REAL(mkdir)(path, mode); }
int rmdir(const char *path) { FAIL(rmdir); return REAL(rmdir)(path); }
int stat64(const char *path, struct stat64 *found) { FAIL(stat64); return REAL(stat64)(path, found); }
int fstat64(int fd, struct stat64 *found) { FAIL(fstat64); return REAL(fstat64)(fd, found); }
int fstatat64(int folder, const char *path, struct stat64 *found, int flags) {
    FAIL(fstatat64);
    return REAL(fstatat64)(folder, path, found, flags);
}
int unlink(const char *path) { FAIL(unlink); return REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) { FAIL(unlinkat); return REAL(unlinkat)(folder, path, flags); }

#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; va_end(more); \
    FAIL(name); return REAL(name)(path, flags, mode); }
OPEN(open64)
OPEN(open)
int openat64(int folder, const char *path, int flags, ...) {
    va_list more; va_start(more, flags); mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; va_end(more);
    FAIL(openat64);
    return REAL(openat64)(folder, path, flags, mode);
}
